"""Steps that train for budgets: against the plain sum of passes, in parts, with every weighting; the runs they make."""

import json
import shutil
import subprocess
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from m3vit.errors import InputError
from m3vit.models.budget import FULL, Budget
from m3vit.models.budget_file import write_budget
from m3vit.run_folder import load_run
from m3vit.training.budgets import distances_count, first_step, of_step, require_begun, space
from m3vit.training.config import TrainConfig, read_config, read_run_config
from m3vit.training.extending import words
from m3vit.training.loop import train
from m3vit.training.optim import make_average, make_optimizer
from m3vit.training.ordering import importance, put_in_order, trained_before, unit_moves
from m3vit.training.starting import build
from m3vit.training.step import Labels, step_losses, task_weights
from tests.conftest import PUP, TINY
from tests.test_cli import refused
from tests.training.launching import run
from tests.training.runs import assert_close, lines, same_bits
from tests.training.test_step import TASKS, assert_same, batch, configuration, gradients, stepper  # noqa: F401

Cli = Callable[..., subprocess.CompletedProcess]
BUDGETS: dict[str, Any] = {"budgets": 2, "budget_width": 0.5}


def test_budgets_of_a_step_are_the_whole_the_smallest_and_random_ones() -> None:
    model = stepper(configuration()).model
    found = space(model, TrainConfig(**BUDGETS))
    train = TrainConfig(budgets=3, seed=7)
    steps = [of_step(train, found, step) for step in range(4)]
    assert all(budgets[0] is FULL and budgets[1] == found.smallest and len(budgets) == 4 for budgets in steps)
    assert steps == [of_step(train, found, step) for step in range(4)]
    drawn = [repr(budget) for budgets in steps for budget in budgets[2:]]
    assert len(set(drawn)) > len(drawn) // 2
    one = [of_step(TrainConfig(budgets=1), found, step) for step in range(4)]
    assert [len(budgets) for budgets in one] == [2] * 4 and one[0][1] == one[2][1] == found.smallest != one[1][1]
    assert of_step(train, None, 0) == [FULL]
    assert [len(of_step(train, found, step, start=2)) for step in range(4)] == [1, 1, 4, 4]
    assert of_step(train, found, 3, start=2) == steps[3]
    assert [first_step(TrainConfig(budgets=1, budget_start=share), 9) for share in (0, 0.5, 0.99)] == [0, 4, 8]
    assert first_step(TrainConfig(), 9) == 0
    with pytest.raises(InputError, match="the smallest budget is the whole model"):
        space(model, TrainConfig(budgets=1, budget_width=1.0, budget_top_k=2))


def slow_loss(config: Any, model: Any, images: Tensor, labels: Labels, budgets: list[Budget]) -> tuple[Tensor, float]:
    """The weighted mean over the passes, each written out; also the mean distance of the smaller ones' tokens."""
    plain = configuration(balance_weight=0.0)
    _, balanced = step_losses(config, model, images, labels)
    total, _ = step_losses(plain, model, images, labels)
    teacher = model(images, native=config.train.native_losses, keep_tokens=True)
    weights, distances = task_weights(config), []
    for budget in budgets[1:]:

        class Small(torch.nn.Module):
            def forward(self, images: Tensor, **options: Any) -> Any:
                return model(images, budget=budget, **options)  # noqa: B023

        learned, _ = step_losses(plain, Small(), images, labels)
        output = model(images, native=config.train.native_losses, budget=budget, keep_tokens=True)
        (mine,), (other,) = output.tokens.values(), teacher.tokens.values()
        mine = (mine - mine.mean(-1, keepdim=True)) / (mine.var(-1, keepdim=True, unbiased=False) + 1e-5).sqrt()
        other = (other - other.mean(-1, keepdim=True)) / (other.var(-1, keepdim=True, unbiased=False) + 1e-5).sqrt()
        tokens = ((mine - other.detach()) ** 2).mean()
        distances.append(float(tokens.detach()))
        logits, target = output.logits, {task: value.detach() for task, value in teacher.logits.items()}
        apart = {
            "semseg": F.kl_div(
                logits["semseg"].log_softmax(1), target["semseg"].log_softmax(1), log_target=True, reduction="none"
            ).sum(1),
            "depth": ((logits["depth"] - target["depth"]) ** 2)[:, 0]
            / (2 * torch.maximum(size(target["depth"]), size((logits["depth"] - target["depth"]).detach()))),
            "normals": ((F.normalize(logits["normals"], dim=1) - F.normalize(target["normals"], dim=1)) ** 2).mean(1)
            / 2,
            "edge": binary_divergence(logits["edge"][:, 0], target["edge"][:, 0]),
        }
        outputs = torch.stack([weights[task] * apart[task].mean() for task in TASKS]).sum()
        total = total + config.train.budget_weight * (learned + 0.5 * tokens + 2.0 * outputs)
    mean = total / (1 + config.train.budget_weight * (len(budgets) - 1))
    return mean + config.train.balance_weight * balanced["balance"], float(np.mean(distances))


def size(x: Tensor) -> Tensor:
    return (x**2).mean((1, 2, 3)).sqrt()[:, None, None]


def binary_divergence(x: Tensor, y: Tensor) -> Tensor:
    p, q = x.sigmoid(), y.sigmoid()
    return q * (q.log() - p.log()) + (1 - q) * ((1 - q).log() - (1 - p).log())


def configured(**train: Any) -> Any:
    given: dict[str, Any] = {**BUDGETS, "budget_weight": 0.5, "budget_tokens": 0.5, "budget_outputs": 2.0, **train}
    return configuration(**given)


@pytest.mark.parametrize("weight", [1.0, 0.25])
def test_a_step_is_the_mean_of_its_passes(batch: tuple[Tensor, Labels], weight: float) -> None:  # noqa: F811
    config = configured(budget_weight=weight)
    values, found = gradients(config, batch)
    other = stepper(config)
    loss, tokens = slow_loss(config, other.model, *batch, of_step(config.train, other.space, 0))
    loss.backward()
    expected = {name: p.grad for name, p in other.model.named_parameters() if p.grad is not None}
    assert_same(expected, found, rtol=1e-3, atol=1e-5)
    assert values["budget/tokens"] == pytest.approx(tokens, rel=1e-4)
    plain, _ = gradients(configuration(), batch)
    assert {name: values[name] for name in plain} == pytest.approx(plain), "what is logged is the whole model's"


@pytest.mark.parametrize("parts", [2, 4])
def test_parts_add_up_to_the_batch(batch: tuple[Tensor, Labels], parts: int) -> None:  # noqa: F811
    images, labels = batch
    few = images[:3], {task: label[:3] for task, label in labels.items()}  # of 4 parts one is a stand-in
    whole, expected = gradients(configured(balance_weight=0.0), few)
    values, found = gradients(configured(balance_weight=0.0, accumulate=parts), few)
    assert values == pytest.approx(whole, rel=1e-4)
    assert_same(expected, found, rtol=1e-3, atol=5e-5)


@pytest.mark.parametrize("options", [{"weighting": "pcgrad"}, {"weighting": "uncertainty"}, {"tasks_per_step": 2}])
def test_weightings_and_drawn_tasks(batch: tuple[Tensor, Labels], options: dict[str, Any]) -> None:  # noqa: F811
    values, found = gradients(configured(**options), batch)
    plain, _ = gradients(configuration(**options), batch)
    assert {name: values[name] for name in plain if name in TASKS} == pytest.approx(
        {name: value for name, value in plain.items() if name in TASKS}
    )
    assert values["budget/loss"] > 0 and values["budget/tokens"] > 0 and values["budget/outputs"] > 0
    assert all(gradient.isfinite().all() for gradient in found.values())


def test_distances_count_more_and_more(batch: tuple[Tensor, Labels]) -> None:  # noqa: F811
    """Half of the training by default, and then whole: a step without them is one of their weights 0."""
    train = TrainConfig(**BUDGETS)
    assert [distances_count(train, step, 8) for step in range(8)] == [0, 0.25, 0.5, 0.75, 1, 1, 1, 1]
    assert distances_count(TrainConfig(budget_warmup=0.0), 0, 8) == distances_count(train, 5, 0) == 1

    def step(number: int, steps: int, **given: float) -> dict[str, Tensor]:
        found = stepper(configured(**given))
        found.steps = steps
        found.gradients(number, *batch)
        return {name: p.grad for name, p in found.model.named_parameters() if p.grad is not None}

    none = step(0, 0, budget_tokens=0.0, budget_outputs=0.0)
    assert_same(none, step(0, 8), rtol=0, atol=0)
    whole, half = step(2, 0), step(2, 8)
    without = step(2, 0, budget_tokens=0.0, budget_outputs=0.0)
    expected = {name: (without[name] + value) / 2 for name, value in whole.items()}
    assert_same(expected, half, rtol=1e-3, atol=1e-5)
    assert any(not torch.allclose(half[name], value, rtol=1e-2) for name, value in whole.items())


def test_heads_of_smaller_passes_do_what_they_do_when_they_predict(batch: tuple[Tensor, Labels]) -> None:  # noqa: F811
    """BatchNorm has the whole model's statistics, and what only trains is the whole model's affair."""
    plain = configuration()
    plain.model.head, plain.model.distillation = "pup", [0]
    small = configured(budgets=3, budget_heads=0.25)
    small.model = plain.model
    steppers = [stepper(plain), stepper(small)]
    passes: list[bool] = []
    for found in steppers:
        for level in found.model.heads.training_only.values():
            level.register_forward_hook(lambda *_: passes.append(True))
    values = [found.gradients(0, *batch) for found in steppers]
    assert len(passes) == 2, "once in a step of one pass, once in a step of four"
    assert {name: values[1][name] for name in values[0]} == pytest.approx(values[0])
    one, other = (dict(found.model.heads.named_buffers()) for found in steppers)
    assert all(torch.equal(buffer, other[name]) for name, buffer in one.items())
    assert all(found.model.heads.training for found in steppers)


def test_half_precision_is_near(batch: tuple[Tensor, Labels]) -> None:  # noqa: F811
    values, _ = gradients(configured(), batch)
    half, _ = gradients(configured(precision="bf16-mixed"), batch)
    assert half["budget/loss"] == pytest.approx(values["budget/loss"], rel=0.05)
    assert half["budget/outputs"] == pytest.approx(values["budget/outputs"], rel=0.3)


GIVEN = [*TINY, "--train.budgets=2", "--train.budget_width=0.5", "--train.budget_weight=0.5"]


@pytest.fixture(scope="module")
def budget_run(cli: Cli, tiny_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run trained for two epochs, for budgets since the second; read only."""
    run = tmp_path_factory.mktemp("budgets") / "run"
    words = (*GIVEN, f"--data.root={tiny_data}", "--train.epochs=2", "--train.budget_start=0.5")
    result = cli("train", "synthetic-tiny", *words, "--out", run)
    assert result.returncode == 0, result.stderr
    return run


def test_a_run_says_what_it_was_trained_for(budget_run: Path, cli: Cli, tiny_data: Path, tmp_path: Path) -> None:
    train = read_run_config(budget_run).train
    assert (train.budgets, train.budget_width, train.budget_top_k) == (2, 0.5, 1)
    logged = [line for line in lines(budget_run) if line["kind"] == "train"]
    assert [line["step"] for line in logged] == [1, 2, 3, 4]
    for line in logged:
        found = {"budget/loss", "budget/tokens", "budget/outputs"} & line.keys()
        assert len(found) == (3 if line["step"] > 2 else 0), "of the second half"
    words = ["train", "synthetic-tiny", *TINY, f"--data.root={tiny_data}", "--out", tmp_path / "run"]
    for given, message in (
        ("--train.budget_width=0.5", "train.budgets is 0, the whole model alone"),
        ("--train.budgets=17", "give at most 16 passes a step"),
        ("--train.budgets=-1", "zero or a positive number"),
        ("--train.budgets=1 --train.budget_skip=[1]", "budget_skip names 1: the blocks that can be left out are"),
        ("--train.budgets=1 --train.budget_width=0", "a share above 0, up to 1"),
        ("--train.budgets=1 --train.budget_warmup=2", "give a share of the training, 0 to 1"),
        ("--train.budgets=1 --train.budget_weight=0", "give 0.01 to 100"),
        ("--train.budgets=1 --train.budget_weight=nan", "train.budget_weight is nan: give a number"),
        ("--train.budgets=1 --train.budget_start=1", "give a share of the training, 0 to below 1"),
        ("--train.budget_start=0.2", "train.budgets is 0, the whole model alone"),
        (
            "--train.budgets=1 --train.budget_tokens=0 --train.budget_outputs=0 --train.budget_warmup=0.1",
            "nothing has to rise",
        ),
        ("--train.budgets=1 --train.budget_top_k=3", "give 1 to model.top_k"),
        ("--train.budgets=1 --train.budget_top_k=2 --train.budget_width=1.0", "the smallest budget is the whole"),
    ):
        refused(cli(*words, *given.split()), message)


def test_runs_from_before_the_warmup_go_on_as_they_began(budget_run: Path, tmp_path: Path) -> None:
    """Those trained for budgets without one; of others nothing differs from what the same command says today."""
    text = (budget_run / "config.yaml").read_text()
    later = ("  budget_warmup", "  budget_start", "# m3vit sha256")
    before = "\n".join(line for line in text.splitlines() if not line.startswith(later))
    for budgets, outputs in ((2, 1.0), (0, 1.0)):
        old = before.replace("  budgets: 2", f"  budgets: {budgets}")
        (tmp_path / "config.yaml").write_text(old.replace("  budget_outputs: 0.1", f"  budget_outputs: {outputs}"))
        train = read_config(tmp_path / "config.yaml").train
        expected = (0.0, 1.0) if budgets else (TrainConfig().budget_warmup, TrainConfig().budget_outputs)
        assert (train.budget_warmup, train.budget_outputs) == expected
        assert train.budget_start == (0.0 if budgets else TrainConfig().budget_start)


def test_more_epochs_say_that_distances_rise_again(budget_run: Path) -> None:
    config = read_run_config(budget_run)
    config.train.epochs = 8
    begun = 5  # of 40 steps: by step 10 they have risen for 5 of 17.5
    assert "budgets' distances count 0.29 of their weights" in words(config, 2, 5, begun)
    assert "budgets' distances count 0.50 of their weights" in words(config, 2, 5)
    config.train.epochs = 4
    assert "distances" not in words(config, 2, 5)


def test_more_epochs_go_on_with_all_budgets(budget_run: Path, tmp_path: Path) -> None:
    """They began at half of the epochs there were; what is half by now is no second beginning, nor a second order."""
    run = tmp_path / "run"
    shutil.copytree(budget_run, run)
    config = read_run_config(run)
    config.train.epochs = 8
    train(config, run, resume=True)
    logged = [line for line in lines(run) if line["kind"] == "train"]
    assert [line["step"] for line in logged if "budget/loss" in line] == list(range(3, 17))


class Enough(Exception):  # noqa: N818 (a signal)
    """The run is to end here."""


@pytest.mark.parametrize("last", [1, 2, 3], ids=["before", "at", "after"])
def test_a_resumed_run_is_the_unbroken_one(budget_run: Path, tmp_path: Path, last: int) -> None:
    """Stopped before the step that budgets begin with, right before it, or after it; with a moving average."""
    config = read_run_config(budget_run)
    config.train.checkpoint_steps = 1
    config.train.ema = 0.9

    def until(step: int, of: int, words: str) -> None:
        if step == last + 1:
            raise Enough

    for name, progress in (("unbroken", None), ("broken", until)):
        with suppress(Enough):
            train(config, tmp_path / name, progress=progress)
    assert len(lines(tmp_path / "broken")) < len(lines(tmp_path / "unbroken"))
    train(config, tmp_path / "broken", resume=True)
    same_bits(tmp_path / "unbroken", tmp_path / "broken")


def test_a_run_that_ended_before_budgets_began_has_none(budget_run: Path, cli: Cli, tmp_path: Path) -> None:
    config, run = read_run_config(budget_run), tmp_path / "run"

    def until(step: int, of: int, words: str) -> None:
        if step == 3:  # after the first of two epochs
            raise Enough

    with suppress(Enough):
        train(config, run, progress=until)
    write_budget(tmp_path / "half.json", Budget(width={0: 32}), {})
    message = rf"{run} ended after 1 epochs, before it was trained for budgets \(train.budget_start 0.5\): go on with"
    refused(cli("search", run, "--budget", 0.9, "--out", tmp_path / "found.json"), message)
    refused(cli("eval", run, "--budget", tmp_path / "half.json"), message)
    config.model.init = f"run:{run}"
    assert trained_before(config.model) is None, "it has no order yet that is to stay"
    config.model.init = "random"
    train(config, run, resume=True)
    require_begun(load_run(run))
    config.model.init = f"run:{run}"
    assert trained_before(config.model) is not None


def test_an_image_that_is_gone_when_units_are_put_in_order(budget_run: Path, make_data: Any, tmp_path: Path) -> None:
    """Whatever was trained is kept."""
    config, run = read_run_config(budget_run), tmp_path / "run"
    config.data.root = str(make_data(tmp_path / "data", train=8, val=2))
    images = {path: path.read_bytes() for path in (tmp_path / "data" / "images").iterdir()}

    def until(step: int, of: int, words: str) -> None:
        for path in images if step == 2 else ():
            path.write_bytes(b"")

    with pytest.raises(InputError, match=r"; everything up to step 2 is kept: go on with --resume"):
        train(config, run, progress=until)
    for path, content in images.items():
        path.write_bytes(content)
    train(config, run, resume=True)
    assert lines(run)[-1]["step"] == 4


def test_the_best_is_one_trained_for_budgets(budget_run: Path, tmp_path: Path) -> None:
    config = read_run_config(budget_run)
    config.train.eval_epochs = 1
    train(config, tmp_path / "run")
    assert [line["epoch"] for line in lines(tmp_path / "run") if line["kind"] == "val"] == [1, 2]
    saved = json.loads((tmp_path / "run" / "best" / "model.json").read_text())
    assert saved["epochs_trained"] == 2, "at the end of the first epoch no budget was trained"


@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
@pytest.mark.parametrize("head", ["linear", "pup"])
def test_what_is_put_in_order_trains_on_as_it_would_have(
    batch: tuple[Tensor, Labels],  # noqa: F811
    optimizer: str,
    head: str,
) -> None:
    """Weights, moments and moving average in order: more steps, then the same outputs as of those left as they were."""
    config = configuration(ema=0.5, optimizer=optimizer, momentum=0.9, lr=1e-4)
    config.model.head, config.model.image_size = head, (16, 24)
    images, labels = batch[0][:, :, :16, :24], {task: label[..., :16, :24] for task, label in batch[1].items()}

    def trained(ordered: bool) -> tuple[Any, Any]:
        one = stepper(config)
        average = make_average(config.train, one.model)
        assert average is not None
        steps = make_optimizer(config.train, one.model)
        one.optimizer = steps
        for step in range(4):
            if step == 2 and ordered:
                moves = unit_moves(one.model, importance(one.model, images)) + one.model.heads.channel_moves()
                before = {name: tensor.clone() for name, tensor in one.model.state_dict().items()}
                put_in_order(moves, one.model, average.module, steps)
                changed = [
                    name for name, tensor in one.model.state_dict().items() if not torch.equal(tensor, before[name])
                ]
                assert any("experts.w2" in name for name in changed) and any("mlp.fc1" in name for name in changed)
                assert any("heads" in name for name in changed) == (head == "pup")
            one.gradients(step, images, labels)
            steps.step()
            average.update_parameters(one.model)
        return one.model.eval(), average.module.eval()

    for left, moved in zip(trained(False), trained(True), strict=True):
        with torch.no_grad():
            expected, found = left(images).logits, moved(images).logits
        for task, logits in expected.items():
            torch.testing.assert_close(found[task], logits, rtol=1e-3, atol=1e-4)


def test_units_keep_their_order_where_the_run_before_was_trained_for_budgets(budget_run: Path, tiny_data: Path) -> None:
    config = read_run_config(budget_run)
    config.model.init = f"run:{budget_run}"
    config.data.root = str(tiny_data)
    trained = load_run(budget_run).model.state_dict()
    assert all(torch.equal(value, trained[name]) for name, value in build(config).state_dict().items())


@pytest.mark.process
@pytest.mark.parametrize(("strategy", "budgets", "start"), [("ddp", 1, 0), ("ddp", 2, 0.5), ("fsdp", 2, 0.5)])
def test_two_processes_train_what_one_does(
    make_data: Callable[..., Path], tmp_path: Path, strategy: str, budgets: int, start: float
) -> None:
    """With one smaller pass a step, the last pass of every other leaves out a block.

    From half of the training on, hidden units are put in order with their moments.
    """
    data = make_data(tmp_path / "data", train=7, val=3)  # of the last batch one process has two images, one has one
    words = ["train", "synthetic-tiny", *GIVEN, f"--data.root={data}", "--train.optimizer=sgd", "--train.lr=0.01"]
    words += ["--train.epochs=2", "--train.accumulate=2", "--train.balance_weight=0", "--train.budget_skip=[0]"]
    words += [f"--train.budgets={budgets}", f"--train.budget_start={start}", "--train.ema=0.5"]
    run([*words, "--out", tmp_path / "one"], tmp_path)
    run([*words, f"--train.strategy={strategy}", "--out", tmp_path / "two"], tmp_path, processes=2)
    assert_close(tmp_path / "one", tmp_path / "two", weights_atol=1e-6)


@pytest.mark.process
def test_two_processes_train_heads_of_fewer_channels(tiny_data: Path, tmp_path: Path) -> None:
    """What only trains has no part in the last pass. Not what one process does: each has its own BatchNorm on CPUs."""
    words = ["train", "synthetic-tiny", *GIVEN, f"--data.root={tiny_data}", *PUP, "--train.epochs=1"]
    words += ["--model.distillation=[0]", "--train.budget_heads=0.5", "--train.budgets=1", "--train.budget_start=0"]
    run([*words, "--out", tmp_path / "run"], tmp_path, processes=2)
    assert all(np.isfinite(line["loss"]) for line in lines(tmp_path / "run") if line["kind"] == "train")
