"""`m3vit search`: its costs, its two choices against all combinations, and the file from search to package."""

import itertools
import json
import math
import shutil
import subprocess
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from m3vit.errors import InputError
from m3vit.evaluation.costs import macs_of
from m3vit.evaluation.search import (
    REFINED,
    Point,
    _levels,
    alone_in,
    best_together,
    between,
    check_share,
    corrected,
    predicted_front,
    read_preferences,
    relative_loss,
    sample_front,
    searched,
)
from m3vit.export.costs import find_costs
from m3vit.export.hls.multiplexed.costing import sizes_of_model
from m3vit.export.runtime.package import Package
from m3vit.hw.cost import Assumptions, lines_of
from m3vit.hw.design import design_of
from m3vit.hw.fit import fit
from m3vit.hw.network import program_of
from m3vit.models.budget import FULL, Budget
from m3vit.models.budget_file import read_budget, write_budget
from m3vit.models.config import ModelConfig
from m3vit.models.multitask import MultiTaskModel
from m3vit.models.space import Space
from m3vit.models.trial import meta_model
from m3vit.profiling import graph_macs
from m3vit.run_folder import load_run
from m3vit.training.config import TrainConfig
from tests.conftest import PUP, TINY
from tests.test_cli import refused

Cli = Callable[..., subprocess.CompletedProcess]
TRUNK = dict(patch_size=8, embed_dim=32, depth=4, num_heads=2, mlp_ratio=2, global_pool="", class_token=False)


def test_costs_are_those_of_the_profile() -> None:
    config = ModelConfig(
        "vit_tiny_patch16_224", TRUNK, image_size=(32, 48), num_experts=6, top_k=3, tasks=["depth", "semseg"]
    )
    model = meta_model(config)
    hidden = model.hidden_widths()
    plain = macs_of(config, searched(model, TrainConfig()), hidden)
    for task, counts in itertools.product(config.tasks, itertools.product((1, 2, 3), repeat=2)):
        used = dict(zip([1, 3], counts, strict=True))
        assert plain.of(task, used, {}) == graph_macs(config, task, (32, 48), Budget({task: used})), (task, counts)
    space = searched(model, TrainConfig(budgets=1, budget_width=0.5, budget_skip=[0]))
    costs, rng = macs_of(config, space, hidden), np.random.default_rng(0)
    for _ in range(12):
        budget = space.random(rng)
        task = config.tasks[int(rng.integers(2))]
        assert costs.of(task, budget.top_k[task], budget.width) == graph_macs(config, task, (32, 48), budget)


def test_channels_of_heads_cost_what_the_graphs_count() -> None:
    config = ModelConfig(
        "vit_tiny_patch16_224",
        TRUNK,
        image_size=(32, 48),
        num_experts=4,
        top_k=2,
        head="pup",
        tasks=["depth", "semseg"],
    )
    model = MultiTaskModel(config)
    space = searched(model, TrainConfig(budgets=1, budget_heads=0.25))
    costs, rng = macs_of(config, space, model.hidden_widths()), np.random.default_rng(0)
    for task in config.tasks:
        budget = space.random(rng)
        used = costs.of(task, budget.top_k[task], budget.width, budget.heads[task])
        assert used == graph_macs(config, task, (32, 48), budget)
    with pytest.raises(InputError, match="pup heads"):
        find_costs("cycles:zcu104", model, space)


def test_cycles_are_those_of_the_programs() -> None:
    """Of the whole, of the smallest and of random budgets: blocks are looked at one by one, and add up."""
    config = ModelConfig(
        "vit_tiny_patch16_224", TRUNK, image_size=(32, 48), num_experts=4, top_k=2, tasks=["depth", "semseg"]
    )
    model = MultiTaskModel(config)
    space = searched(model, TrainConfig(budgets=1, budget_width=0.25, budget_skip=[2]))
    costs = find_costs("cycles:zcu104", model, space)
    design = design_of("zcu104")
    network = sizes_of_model(config)
    hardware = fit(program_of(network, 16, 16, design.target.port_bits), 16, 16, design.target, design.sizes)
    rng = np.random.default_rng(0)
    for budget in (Budget(), space.smallest, space.random(rng), space.random(rng)):
        kept = [block for block in range(4) if budget.width.get(block) != 0]
        widths = [budget.width.get(block, network.mlps[block]) for block in kept]
        counts = [budget.top_k.get("semseg", {}).get(block, 2) if block % 2 else 0 for block in kept]
        program = program_of(replace(network, mlps=widths, top_ks=counts), 16, 16, design.target.port_bits)
        lines = lines_of(program, hardware, design.target, 1, Assumptions())
        used = budget.top_k.get("semseg", {})
        assert costs.of("semseg", used, budget.width) == pytest.approx(sum(line.cycles for line in lines), abs=20)
    with pytest.raises(InputError, match="give one of macs, latency, cycles:BOARD"):
        find_costs("time", model, space)
    with pytest.raises(InputError, match=r"--cost is .cycles:nowhere.: give cycles: and one of .*zcu104"):
        find_costs("cycles:nowhere", model, space)


@pytest.mark.slow
def test_latency_is_measured_for_every_choice() -> None:
    config = ModelConfig("vit_tiny_patch16_224", TRUNK, image_size=(32, 48), num_experts=4, top_k=2, tasks=["depth"])
    model = MultiTaskModel(config).eval()
    space = searched(model, TrainConfig(budgets=1, budget_width=0.5))
    costs = find_costs("latency", model, space)
    assert costs.unit == "ms" and costs.whole["depth"] > 0
    assert {block: set(table) for block, table in costs.saved.items()} == {
        **{block: {(0, width) for width in space.widths[block]} for block in (0, 2)},
        **{block: {(count, width) for count in (1, 2) for width in space.widths[block]} for block in (1, 3)},
    }


@pytest.mark.parametrize("seed", range(20))
def test_the_front_of_a_task_is_that_of_all_combinations(seed: int) -> None:
    rng = np.random.default_rng(seed)
    top_k, blocks = 3, 4
    units = rng.integers(1, 4, blocks)
    alone = [{count: 0.0 if count == top_k else float(rng.integers(-2, 9)) for count in (3, 1, 2)} for _ in range(4)]

    def macs(counts: tuple[int, ...]) -> int:
        return 100 + int(sum(units * counts))

    everything = [
        Point(counts, macs(counts), sum(losses[count] for losses, count in zip(alone, counts, strict=True)))
        for counts in itertools.product((1, 2, 3), repeat=blocks)
    ]
    expected = {
        (one.cost, one.loss)
        for one in everything
        if not any(
            (other.cost <= one.cost and other.loss < one.loss) or (other.cost < one.cost and other.loss <= one.loss)
            for other in everything
        )
    }
    found = predicted_front(alone, macs, (top_k,) * blocks)
    assert [(point.cost, point.loss) for point in found] == sorted(expected)
    for point in found:
        assert point in everything
    assert sample_front(found, 2)[0] == found[0] and sample_front(found, 2)[-1] == found[-1]


@pytest.mark.parametrize("seed", range(20))
def test_widths_next_to_what_is_asked_are_among_those_measured(seed: int) -> None:
    """Of all combinations of widths, the unbeaten one that fills the compute asked for, and the next above it."""
    rng = np.random.default_rng(seed)
    found = Space(
        ("depth", "edge"), (1,), 1, 2, {block: ((0,) if block % 2 == 0 else ()) + (4, 8, 16) for block in range(4)}
    )
    lost = {(block, width): float(rng.integers(-3, 30)) for block in range(4) for width in (0, 4)}
    units = rng.integers(1, 9, 4)

    class Measured:  # losses add up
        total = 0

        def losses(self, budget: Budget, words: str) -> dict[str, float]:
            return dict.fromkeys(("depth", "edge"), sum(losses[block][width] for block, width in budget.width.items()))

    def of(task: str, counts: dict[int, int], widths: dict[int, int], channels: int | None = None) -> float:
        return 50 + 9 * counts.get(1, 2) + sum(float(units[block]) * width for block, width in widths.items())

    costs, both = SimpleNamespace(of=of), {"depth": 1.0, "edge": 3.0}
    losses = [
        between(found.widths[block], {w: lost[block, w] for w in alone_in(found.widths[block])}) for block in range(4)
    ]
    every = [
        (2 * of("", {}, dict(enumerate(widths))), sum(one[w] for one, w in zip(losses, widths, strict=True)), widths)
        for widths in itertools.product(*found.widths.values())
    ]
    front = [one for one in every if not any(o[0] <= one[0] and o[1] <= one[1] and o[:2] != one[:2] for o in every)]
    for limit in np.linspace(min(front)[0], max(front)[0], 7):
        levels = _levels(found, list(range(4)), costs, both, Measured(), limit)  # type: ignore[arg-type]
        assert levels[0] == {} and tuple(levels[-1].values()) == (0, 4, 0, 4) and len(levels) <= 6
        taken = {2 * of("", {}, level or dict.fromkeys(range(4), 16)) for level in levels}
        assert max(one[0] for one in front if one[0] <= limit) in taken
        above = min((one[0] for one in front if one[0] > limit), default=math.inf)
        assert above in taken or above - 2 * 9 > limit  # one expert less of each task does not make up for it
        costs_of = [2 * of("", {}, level) for level in levels[1:]]
        assert costs_of == sorted({*costs_of}, reverse=True)


@pytest.mark.parametrize("share", [0.26, 0.3, 0.5, 0.7])
def test_widths_leave_room_for_heads_of_fewer_channels(share: float) -> None:
    """Heads of all channels alone take more than the half: the widest that may with the fewest are measured too."""
    widths, heads = {block: (4, 8, 12, 16) for block in range(3)}, {"depth": (64, 256), "edge": (64, 256)}
    found = Space(("depth", "edge"), (), 1, 1, widths, heads)

    class Measured:
        total = 0

        def losses(self, budget: Budget, words: str) -> dict[str, float]:
            return {"depth": sum(3.0 + block for block, width in budget.width.items() if width < 16), "edge": 1.0}

    def of(task: str, counts: dict[int, int], widths: dict[int, int], channels: int | None = None) -> float:
        return (channels or 256) / 2 + sum(widths.values())

    whole = 2 * of("", {}, dict.fromkeys(widths, 16))
    limit, costs = share * whole, SimpleNamespace(of=of)
    levels = _levels(found, list(widths), costs, dict.fromkeys(heads, 1.0), Measured(), limit)  # type: ignore[arg-type]
    assert len(levels) <= 7
    least = [2 * of("", {}, level or dict.fromkeys(widths, 16), 64) for level in levels]
    sums = {2 * of("", {}, dict(enumerate(choice)), 64) for choice in itertools.product(*widths.values())}
    possible = max(one for one in sums if one <= limit)
    assert max(one for one in least if one <= limit) == pytest.approx(possible, abs=8)


def test_losses_are_corrected_by_what_widths_lose_together() -> None:
    both = [[16, 64], [16, 64]]
    assert corrected(both, [{16: 1.0}, {16: 2.0}], {}) == [{16: 1.0, 64: 0.0}, {16: 2.0, 64: 0.0}]
    found = corrected(both, [{16: 1.0}, {16: 2.0}], {(16, 16): 5.0})  # 2 more, of which each has the half
    assert [one[16] for one in found] == pytest.approx([2.0, 3.0]) and [one[64] for one in found] == [0.0, 0.0]
    (found,) = corrected([[16, 40, 64]], [{16: 1.0}], {(40,): 1.0})  # half of the units missing lose all of it
    assert found == pytest.approx({16: 2.0, 40: 1.0, 64: 0.0})
    (found,) = corrected([[0, 16, 64]], [{0: 3.0, 16: 1.0}], {(0,): 5.0})
    assert found == pytest.approx({0: 5.0, 16: 1.0, 64: 0.0})


@pytest.mark.parametrize("seed", range(10))
def test_widths_that_lose_more_together_are_measured_and_left(seed: int) -> None:
    """Beside the choice that adding up gives, others are measured, and the best of them is among the levels."""
    rng = np.random.default_rng(seed)
    blocks = list(range(6))
    found = Space(("depth",), (), 1, 1, {block: (0, 4, 16) for block in blocks})
    alone = {block: {0: float(rng.uniform(2, 6)), 4: float(rng.uniform(1, 2)), 16: 0.0} for block in blocks}
    units, tried = rng.integers(1, 9, len(blocks)), dict[tuple[int, ...], float]()

    def loss(widths: dict[int, int]) -> float:
        narrowed = {block for block, width in widths.items() if width < 16}
        return sum(alone[block][width] for block, width in widths.items()) + 4.0 * (
            {0, 1} <= narrowed or {2, 3} <= narrowed
        )

    class Measured:
        total = 0

        def losses(self, budget: Budget, words: str) -> dict[str, float]:
            if words == "widths":
                tried[tuple(budget.width.values())] = loss(budget.width)
            return {"depth": loss(budget.width)}

    def of(task: str, counts: dict[int, int], widths: dict[int, int], channels: int | None = None) -> float:
        return sum(float(units[block]) * width for block, width in widths.items())

    limit, costs = 8.0 * units.sum(), SimpleNamespace(of=of)
    levels = _levels(found, blocks, costs, {"depth": 1.0}, Measured(), limit)  # type: ignore[arg-type]
    first, best = next(iter(tried.values())), min(tried.values())
    assert len(tried) <= REFINED and all(of("", {}, dict(enumerate(one))) <= limit for one in tried)
    assert best in [loss(level) for level in levels]
    every = [
        loss(widths)
        for choice in itertools.product((0, 4, 16), repeat=len(blocks))
        if of("", {}, widths := dict(enumerate(choice))) <= limit
    ]
    assert best <= min(every) + 0.1 * (first - min(every)) + 1e-9, "what adding up gave was up to twice as bad"


def test_a_cost_that_other_programs_spoil_is_no_advice() -> None:
    space = Space(("depth",), (1,), 1, 2, {})
    with pytest.raises(InputError, match=r"takes 3.000 of the whole model's ms, so other programs are in the way"):
        check_share(0.5, 3.0, "ms", space, trained=True)
    with pytest.raises(InputError, match=r"takes 0.700 of its ms \(train.budget_top_k.*\): give 0.7 to 1"):
        check_share(0.5, 0.7, "ms", space, trained=True)


@pytest.mark.parametrize("seed", range(20))
def test_points_together_are_the_best_of_all_choices(seed: int) -> None:
    rng = np.random.default_rng(seed)
    fronts = {
        task: [Point((place,), int(rng.integers(1, 9)), float(rng.integers(-3, 9))) for place in range(4)]
        for task in ("semseg", "depth", "edge")
    }
    weights = {"semseg": 1.0, "depth": 2.0, "edge": 0.0}
    found = best_together(fronts, weights)
    for limit in range(3, 25):
        expected = math.inf
        for choice in itertools.product(*fronts.values()):
            if sum(point.cost for point in choice) <= limit:
                expected = min(expected, (choice[0].loss + 2 * choice[1].loss) / 3)
        within = [loss for macs, loss, _ in found if macs <= limit]
        assert (min(within) if within else math.inf) == pytest.approx(expected)
    for macs, loss, points in found:
        assert macs == sum(point.cost for point in points.values())
        assert loss == pytest.approx((points["semseg"].loss + 2 * points["depth"].loss) / 3)


def test_losses_are_relative_and_positive_where_worse() -> None:
    assert relative_loss("semseg", 40.0, 38.0) == pytest.approx(5.0)
    assert relative_loss("depth", 0.8, 0.84) == pytest.approx(5.0)
    assert relative_loss("depth", 0.8, 0.76) == pytest.approx(-5.0)


def test_preferences() -> None:
    tasks = ["semseg", "depth"]
    assert read_preferences(None, tasks) == {"semseg": 1, "depth": 1}
    assert read_preferences("depth=2.5", tasks) == {"semseg": 1, "depth": 2.5}
    for text, words in (
        ("edge=1", "of the tasks semseg, depth"),
        ("depth", "give task=weight"),
        ("depth=-1", "weights of 0 or more"),
        ("depth=nan", "weights of 0 or more"),
        ("depth=inf", "weights of 0 or more"),
        ("depth=1,depth=2", "weighs depth twice"),
        ("depth=0,semseg=0", "leaves no task any weight"),
    ):
        with pytest.raises(InputError, match=words):
            read_preferences(text, tasks)


def test_files_that_are_no_budget(tmp_path: Path) -> None:
    path = tmp_path / "budget.json"
    with pytest.raises(InputError, match=r"budget\.json"):
        read_budget(path)
    path.write_text("{}")
    with pytest.raises(InputError, match="m3vit search writes"):
        read_budget(path)
    budget = Budget({"depth": {1: 2}})
    write_budget(path, budget, {})
    assert read_budget(path) == budget
    path.write_text(path.read_text().replace('"1": 2', '"1": 3'))
    with pytest.raises(InputError, match="not as it was written"):
        read_budget(path)


@pytest.mark.slow
def test_from_search_to_package(cli: Cli, tiny_run: Path, tmp_path: Path) -> None:
    run, file, package = tmp_path / "run", tmp_path / "light.json", tmp_path / "package"
    shutil.copytree(tiny_run, run)
    refused(cli("search", run, "--budget", 0.3, "--out", file), "one expert per token in every block this model still")
    refused(cli("search", run, "--budget", 1.5, "--out", file), "give a number above 0, up to 1")
    refused(cli("search", run, "--budget", 1, "--prefer", "x=1", "--out", file), "of the tasks")
    refused(cli("search", run, "--budget", 1, "--out", tmp_path / "no" / "x.json"), "is no folder")
    assert not file.exists()
    result = cli("search", run, "--budget", 0.99, "--prefer", "depth=3", "--images", 2, "--out", file)
    assert result.returncode == 0, result.stderr
    refused(cli("search", run, "--budget", 0.99, "--out", file), "is there already")
    told = json.loads(file.read_text())["search"]
    assert told["share_of_macs"] <= 0.99 and told["images"] == 2 and told["preferences"]["depth"] == 3
    budget = read_budget(file)
    assert {count for of in budget.top_k.values() for count in of.values()} <= {1, 2}
    assert any(count == 1 for of in budget.top_k.values() for count in of.values())

    before = cli("eval", run)
    assert before.returncode == 0, before.stderr
    whole = (run / "eval.json").read_bytes()
    result = cli("eval", run, "--budget", file)
    assert result.returncode == 0, result.stderr
    assert (run / "eval.json").read_bytes() == whole, "the run's own evaluation stays"
    entry = json.loads((run / "budgets" / "light" / "eval.json").read_text())["protocols"]["A"]
    assert entry["budget"] == budget.to_json()
    result = cli("eval", "--compare", run, run / "budgets" / "light")
    assert result.returncode == 0, result.stderr

    refused(cli("export", "onnx", run, "--budget", file, "--top-k", 1, "--out", package), "leave out --top-k")
    result = cli("export", "onnx", run, "--budget", file, "--tasks", "depth", "--measure", 0, "--out", package)
    assert result.returncode == 0, result.stderr
    entry = json.loads((package / "manifest.json").read_text())["tasks"]["depth"]
    assert entry["macs"] == told["tasks"]["depth"]["macs"]
    refused(cli("eval", package, "--budget", file), "has no budgets to choose from")
    write_budget(tmp_path / "narrow.json", Budget(width={1: 8}), {})
    refused(cli("eval", run, "--budget", tmp_path / "narrow.json"), "this run was not trained for fewer than all")
    write_budget(tmp_path / "other.json", Budget({"depth": {7: 1}}), {})
    refused(cli("eval", run, "--budget", tmp_path / "other.json"), "budget names block 7")


@pytest.mark.slow
def test_tasks_have_the_channels_that_their_preferences_leave_them(cli: Cli, tiny_data: Path, tmp_path: Path) -> None:
    run, file = tmp_path / "run", tmp_path / "some.json"
    words = [f"--data.root={tiny_data}", "--train.epochs=1", "--train.budgets=1", "--train.budget_heads=0.25"]
    words += [*PUP, "--model.tasks=[semseg,depth]"]
    result = cli("train", "synthetic-tiny", *TINY, *words, "--out", run)
    assert result.returncode == 0, result.stderr
    result = cli("search", run, "--budget", 0.3, "--prefer", "depth=1,semseg=0", "--images", 2, "--out", file)
    assert result.returncode == 0, result.stderr
    assert "channels" in result.stdout
    told, budget, model = json.loads(file.read_text())["search"], read_budget(file), load_run(run).model
    assert told["share_of_macs"] <= 0.3, "most of what the model costs is its heads"
    size = tuple(model.config.image_size)
    for task, entry in told["tasks"].items():
        assert entry["channels"] == budget.heads[task] and entry["channels"] in (64, 128, 192, 256)
        assert entry["macs"] == graph_macs(model.config, task, size, budget)
    assert budget.heads["semseg"] == 64, "whose loss counts nothing"
    refused(cli("search", run, "--budget", 0.01, "--out", tmp_path / "none.json"), "takes 0.", "give 0.")
    result = cli("eval", run, "--budget", file)
    assert result.returncode == 0, result.stderr
    write_budget(tmp_path / "narrow.json", Budget(heads={"depth": 32}), {})
    refused(cli("eval", run, "--budget", tmp_path / "narrow.json"), "the smallest that this run was trained for has 64")


@pytest.mark.slow
def test_a_run_trained_for_budgets_from_search_to_package(cli: Cli, tiny_data: Path, tmp_path: Path) -> None:
    run, package = tmp_path / "run", tmp_path / "package"
    words = [f"--data.root={tiny_data}", "--train.epochs=2", "--train.budgets=2", "--train.budget_skip=[0]"]
    assert cli("train", "synthetic-tiny", *TINY, *words, "--out", run).returncode == 0
    light, fast = tmp_path / "light.json", tmp_path / "fast.json"
    least = ("search", run, "--budget", 0.05, "--out", light)
    refused(cli(*least), "the smallest budget that this model was trained for takes 0.")
    refused(cli(*least, "--cost", "time"), "give one of macs, latency, cycles:BOARD")
    for file, share in ((light, 0.95), (fast, 0.85)):
        result = cli("search", run, "--budget", share, "--prefer", "depth=3", "--images", 2, "--out", file)
        assert result.returncode == 0, result.stderr
        assert "hidden units" in result.stdout and "was trained for such budgets" in result.stdout
        told = json.loads(file.read_text())["search"]
        assert told["share_of_macs"] <= share
        shares = [one["share_of_macs"] for one in told["front"]]
        assert shares == sorted(shares)
        model, budget = load_run(run).model, read_budget(file)
        size = tuple(model.config.image_size)
        for task, entry in told["tasks"].items():
            assert entry["macs"] == graph_macs(model.config, task, size, budget)
    assert read_budget(fast).width, "so small a budget is not had by fewer experts alone"
    result = cli("eval", run, "--budget", fast)
    assert result.returncode == 0, result.stderr
    given = f"full,{light},{fast}"
    more = ("--tasks", "depth", "--measure", 2)
    refused(cli("export", "onnx", run, "--budget", f"{fast},{fast}", "--out", package), "names fast twice")
    result = cli("export", "onnx", run, "--budget", given, *more, "--out", package)
    assert result.returncode == 0, result.stderr
    assert "depth, budget fast: worst relative error" in result.stdout and "fp32, budget fast" in result.stdout
    assert Package.load(package).budgets == ["full", "light", "fast"]
    result = cli("eval", package, "--budget", "fast", "--data.root", tiny_data)
    assert result.returncode == 0, result.stderr
    of_run, of_package = (
        json.loads((folder / "budgets" / "fast" / "eval.json").read_text())["protocols"]["A"]["tasks"]["depth"]
        for folder in (run, package)
    )
    assert of_package["onnx"]["rmse"] == pytest.approx(of_run["torch"]["rmse"], rel=1e-3)
    refused(cli("eval", package, "--budget", "slow"), "slow")

    page = tmp_path / "report.html"
    assert cli("eval", run).returncode == 0
    result = cli("report", run, "--budget", f"{light},{fast}", "--images", 1, "--out", page)
    assert result.returncode == 0, result.stderr
    told = json.loads(page.with_suffix(".json").read_text())["budgets"]
    assert list(told) == ["full", "light", "fast"] and told["full"]["loss_percent"] == 0
    assert all(told[file.stem]["budget"] == read_budget(file).to_json() for file in (light, fast))
    assert told["full"]["budget"] == FULL.to_json()
    text = page.read_text()
    assert "<th>hidden units of blocks 0·1</th>" in text
    assert text.count('class="of-budget"') == 3 * 4 and 'type="range" min="0" max="2"' in text
    result = cli("profile", run, "--budget", fast, "--json", tmp_path / "profile.json")
    assert result.returncode == 0 and "under a budget" in result.stdout, result.stderr
    counted = json.loads((tmp_path / "profile.json").read_text())["tasks"]
    wanted = json.loads(fast.read_text())["search"]["tasks"]
    assert {task: entry["macs"]["total"] for task, entry in counted.items()} == {
        task: entry["macs"] for task, entry in wanted.items()
    }
    refused(cli("report", run, run, "--budget", fast, "--out", page), "are of one run's report")
    write_budget(tmp_path / "less.json", Budget(width={1: 2}), {})
    for words in (("eval", run), ("export", "onnx", run, "--out", package), ("report", run, "--out", page)):
        refused(cli(*words, "--budget", tmp_path / "less.json"), "the smallest that this run was trained for has 8")
    result = cli("search", run, "--budget", 0.9, "--cost", "latency", "--images", 2, "--out", tmp_path / "fewer.json")
    assert result.returncode in (0, 2), result.stderr
    if result.returncode == 0:  # the least share is measured, and of so small a model may be more than that
        assert "of the ms of all tasks' graphs" in result.stdout
        cost = json.loads((tmp_path / "fewer.json").read_text())["search"]["cost"]
        assert cost["by"] == "latency" and cost["share_measured"] > 0
