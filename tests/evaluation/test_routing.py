"""Routing over a split: every figure against one worked out token by token, with lists and sets."""

import math
from collections import Counter
from itertools import combinations
from typing import Any

import numpy as np
import pytest
import torch

from m3vit.data.sample import Sample
from m3vit.errors import InputError
from m3vit.evaluation.evaluate import normalised
from m3vit.evaluation.protocols import network_image
from m3vit.evaluation.routing import Choices, check_routed, choices, gather, patch_bins
from m3vit.evaluation.routing_figures import _renamed, even_jaccard, figures, information
from m3vit.kinds import IGNORE, KINDS
from m3vit.models.budget import FULL, Budget
from m3vit.models.config import ModelConfig
from m3vit.models.multitask import MultiTaskModel
from m3vit.tasks import TASKS as TABLE

TASKS = ["semseg", "depth", "normals", "edge"]
SIZE, GRID, E = (24, 32), (3, 4), 5
TRUNK = dict(patch_size=8, embed_dim=16, depth=4, num_heads=2, mlp_ratio=2, global_pool="", class_token=True)


def make(**changes: Any) -> MultiTaskModel:
    torch.manual_seed(0)
    defaults: dict[str, Any] = {"num_experts": E, "top_k": 2, "tasks": TASKS}
    config = ModelConfig("vit_tiny_patch16_224", TRUNK, image_size=SIZE, **defaults | changes)
    return MultiTaskModel(config).eval()


class Rooms:
    """A split of five photographs, larger than the network's size and no multiple of its grid."""

    label_set, release, split, tasks, partial = "nyud", "made", "val", TASKS, False
    ids = tuple("abcde")

    def __len__(self) -> int:
        return len(self.ids)

    def load(self, index: int) -> Sample:
        rng, size = np.random.default_rng(index), (31, 45)
        rows = np.arange(size[0])[:, None].repeat(size[1], 1)
        image = rng.integers(0, 256, (*size, 3), dtype=np.uint8)
        image[rows < 12 + index] //= 4
        normals = rng.normal(size=(*size, 3)).astype(np.float32)
        normals /= np.linalg.norm(normals, axis=-1, keepdims=True)
        labels = {
            "semseg": np.where(rows < 12 + index, 3, rng.integers(0, 40, size)).astype(np.uint8),
            "depth": rng.uniform(0.5, 9, size).astype(np.float32),
            "normals": normals,
            "edge": (rng.random(size) < 0.01).astype(np.uint8),
        }
        labels["semseg"][:, 20:] = IGNORE if index == 2 else labels["semseg"][:, 20:]
        labels["depth"][25:] = 0
        return Sample(self.ids[index], image, labels)


@torch.no_grad()
def routed(model: MultiTaskModel, image: np.ndarray, budget: Budget) -> list[list[list[dict[int, float]]]]:
    """{expert: weight} of each patch [block][task][patch], from the model's own forward pass over one image."""
    batch = normalised([network_image("A", "", image, SIZE)], model.normalisation)
    found = []
    for routing in model(batch, budget=budget).routings:
        tasks = []
        for task in range(len(TASKS)):
            tokens = []
            for token in range(1, 1 + math.prod(GRID)):  # after the class token
                used = routing.used_RK[task].tolist() if routing.used_RK is not None else [True] * 2
                ids, weights = routing.expert_ids_RNK[task, token], routing.weights_RNK[task, token]
                tokens.append({int(e): float(w) for e, w, one in zip(ids, weights, used, strict=False) if one})
            tasks.append(tokens)
        found.append(tasks)
    return found


def bins_of(task: str, label: np.ndarray) -> list[int | None]:
    """The bin of each patch, pixel by pixel."""
    height, width = label.shape[:2]
    pixels: list[list[int | None]] = [[] for _ in range(math.prod(GRID))]
    for y in range(height):
        for x in range(width):
            patch = int((y + 0.5) / height * GRID[0]) * GRID[1] + int((x + 0.5) / width * GRID[1])
            value: Any = label[y, x]
            if task == "depth":
                ends = [1, 1.5, 2, 3, 4, 6, 8, math.inf]
                one = None if value == 0 else next(i for i, end in enumerate(ends) if value < end)
            elif task == "normals":
                right, up, near = map(float, value)
                one = int(np.argmax([right, -right, up, -up, near]))
            else:
                one = None if value == IGNORE else int(value)
            pixels[patch].append(one)
    found: list[int | None] = []
    for values in pixels:
        known = [one for one in values if one is not None]
        if 2 * len(known) < len(values):
            found.append(None)
        elif task == "edge" and 1 in known:
            found.append(1)
        else:
            found.append(min(known, key=lambda one: (-known.count(one), one)))
    return found


def best(patch: dict[int, float]) -> int:
    return max(patch, key=lambda expert: patch[expert])


def shannon(counts: Any) -> float:
    total = sum(counts)
    return -sum(n / total * math.log2(n / total) for n in counts if n)


BUDGETS = {
    "as trained": FULL,
    "less": Budget({"depth": {1: 1}, "edge": {3: 1}}, {"normals": {3: (0, 2, 4)}}),
}


@pytest.mark.parametrize(("name", "batch"), [("as trained", 1), ("less", 2)])
def test_figures_are_those_of_the_tokens(name: str, batch: int) -> None:
    model, split, budget = make(), Rooms(), BUDGETS[name]
    sums = gather(model, split, range(5), budget=budget, batch=batch)  # type: ignore[arg-type]
    found = figures(sums)
    order = np.random.default_rng(0).permutation(5)
    samples = [split.load(int(index)) for index in order]
    tokens = [routed(model, sample.image, budget) for sample in samples]
    T, N = math.prod(GRID), len(samples)
    for layer, block in enumerate(("1", "3")):
        per_task = {task: [patch for one in tokens for patch in one[layer][r]] for r, task in enumerate(TASKS)}
        shares = {}
        for task, patches in per_task.items():
            use = found["use"][block]["tasks"][task]
            counts = Counter(e for patch in patches for e in patch)
            k = len(patches[0])
            shares[task] = [counts[e] / (N * T) for e in range(E)]
            assert use["chosen"] == pytest.approx(shares[task], abs=1e-6)
            first = Counter(map(best, patches))
            assert use["first"] == pytest.approx([first[e] / (N * T) for e in range(E)], abs=1e-6)
            for e in range(E):
                mean = sum(patch.get(e, 0) for patch in patches) / counts[e] if counts[e] else None
                assert use["weight"][e] == (mean and pytest.approx(mean, rel=1e-5))
            whole = sum(sum(patch.values()) for patch in patches) / (N * T)
            assert use["weight_of_chosen"] == pytest.approx(whole, rel=1e-5)
            assert use["entropy"] == pytest.approx(shannon(counts.values()) / math.log2(E), rel=1e-5)
            assert use["dead"] == [e for e in range(E) if counts[e] / (N * T * k) < 0.01 / E]
        assert found["top_k"]["depth"][block] == len(per_task["depth"][0])
        rows = found["apart"]["blocks"][block]["pairs"]
        assert [row["tasks"] for row in rows] == [list(pair) for pair in combinations(TASKS, 2)]
        for row in rows:
            a, b = (per_task[task] for task in row["tasks"])
            sets = [(set(x), set(y)) for x, y in zip(a, b, strict=True)]
            k = min(len(a[0]), len(b[0]))
            assert row["shared"]["value"] == pytest.approx(np.mean([len(x & y) / k for x, y in sets]), abs=1e-6)
            assert row["jaccard"] == pytest.approx(np.mean([len(x & y) / len(x | y) for x, y in sets]), abs=1e-6)
            # The patches of all but the first image, with those in the same places of the image before.
            moved = [(x, y) for x, y in zip([set(p) for p in a[T:]], [set(p) for p in b[:-T]], strict=True)]
            assert row["shared_elsewhere"] == pytest.approx(np.mean([len(x & y) / k for x, y in moved]), abs=1e-6)
            assert row["jaccard_elsewhere"] == pytest.approx(
                np.mean([len(x & y) / len(x | y) for x, y in moved]), abs=1e-6
            )
            firsts = [best(x) == best(y) for x, y in zip(a, b, strict=True)]
            assert row["same_first"] == pytest.approx(np.mean(firsts), abs=1e-6)
            share_a, share_b = (np.array(shares[task]) for task in row["tasks"])
            assert row["shared_by_use"] == pytest.approx((share_a * share_b).sum() / k, abs=1e-5)
            use_a, use_b = share_a / share_a.sum(), share_b / share_b.sum()
            distance = np.abs(use_a - use_b).sum() / 2
            assert row["similarity_of_use"]["value"] == pytest.approx(1 - distance, abs=1e-5)
            assert row["cosine_of_use"] == pytest.approx(
                use_a @ use_b / math.sqrt((use_a @ use_a) * (use_b @ use_b)), abs=1e-5
            )
            assert row["shared_evenly"] == pytest.approx(max(len(a[0]), len(b[0])) / E)
            both = sums.pairs.both_LPEE[layer, rows.index(row)]
            assert both.tolist() == [[sum(e in x and f in y for x, y in sets) for f in range(E)] for e in range(E)]
            low, high = row["shared"]["interval"]
            assert low <= row["shared"]["value"] <= high
        use = np.array([np.array(share) / sum(share) for share in shares.values()])
        apart = shannon(use.mean(axis=0)) - np.mean([shannon(one) for one in use])
        assert found["apart"]["blocks"][block]["all"]["information"]["value"] == pytest.approx(apart / 2, abs=1e-5)
        for labelled in TASKS:
            bins = [one for sample in samples for one in bins_of(labelled, sample.labels[labelled])]
            table = found["labels"][labelled]
            assert table["patches"] == [bins.count(c) for c in range(len(table["bins"]))]
            for task, patches in per_task.items():
                joint = Counter((c, e) for c, patch in zip(bins, patches, strict=True) for e in patch if c is not None)
                rows_, columns = Counter[int](), Counter[int]()
                for (c, e), n in joint.items():
                    rows_[c] += n
                    columns[e] += n
                both = shannon(rows_.values()) + shannon(columns.values()) - shannon(joint.values())
                entry = table["blocks"][block][task]
                assert entry["information_bits"] == pytest.approx(both, abs=1e-5)
                assert entry["information"] == pytest.approx(both / shannon(columns.values()), abs=1e-5)
                total = joint.total()
                for c in rows_:
                    share = [joint[c, e] / rows_[c] for e in range(E)]
                    assert entry["share"][c] == pytest.approx(share, abs=1e-6)
                    lift = [n / (columns[e] / total) if columns[e] else None for e, n in enumerate(share)]
                    assert entry["lift"][c] == [one and pytest.approx(one, rel=1e-4) for one in lift]
                other = [c for one in samples[:-1] for c in bins_of(labelled, one.labels[labelled])]
                moved_ = Counter(
                    (c, e) for c, patch in zip(other, patches[T:], strict=True) for e in patch if c is not None
                )
                assert entry["information_elsewhere"] == pytest.approx(
                    explained([[moved_[c, e] for e in range(E)] for c in range(40)]), abs=1e-5
                )


def explained(table: list[list[int]]) -> float:
    columns = [sum(column) for column in zip(*table, strict=True)]
    both = shannon([sum(row) for row in table]) + shannon(columns) - shannon([n for row in table for n in row])
    return both / shannon(columns)


def test_entropy_of_the_gates() -> None:
    model = make()
    found = figures(gather(model, Rooms(), [2]))["use"]  # type: ignore[arg-type]
    batch = normalised([network_image("A", "", Rooms().load(2).image, SIZE)], model.normalisation)
    with torch.no_grad():
        routings = model(batch).routings
    for block, routing in zip(("1", "3"), routings, strict=True):
        for place, task in enumerate(TASKS):
            scores = [[float(p) for p in token] for token in routing.scores_RNE[place, 1:]]
            mean = sum(-sum(p * math.log(p) for p in token) for token in scores) / len(scores)
            assert found[block]["tasks"][task]["gate_entropy"] == pytest.approx(mean / math.log(E), rel=1e-5)


def test_one_gate_for_all_tasks_shares_everything() -> None:
    everything = figures(gather(make(router="single"), Rooms(), range(3)))["apart"]["all"]  # type: ignore[arg-type]
    assert everything["shared"] == {"value": 1.0, "interval": [1.0, 1.0]}
    assert everything["verdict"] == "together" and everything["information"]["value"] == pytest.approx(0, abs=1e-9)


def test_tasks_with_experts_of_their_own_share_none() -> None:
    own = {task: [2 * place, 2 * place + 1] for place, task in enumerate(TASKS)}
    model = make(experts_per_task=own, num_experts=8)
    everything = figures(gather(model, Rooms(), range(3)))["apart"]["all"]  # type: ignore[arg-type]
    assert everything["shared"]["value"] == 0 and everything["verdict"] == "apart"
    assert everything["information"]["value"] == pytest.approx(1)  # the expert tells the task
    assert everything["shared_evenly"] == everything["shared_by_use"]["value"] + 2 / 8 == 2 / 8


def test_gates_that_never_saw_one_another_are_no_different_from_chance() -> None:
    verdicts = []
    for seed in range(10):
        torch.manual_seed(seed)
        model = make()
        for block in (1, 3):
            for gate in model.backbone.trunk.blocks[block].mlp.router.gates:
                torch.nn.init.normal_(gate)
        everything = figures(gather(model, Rooms(), range(3)))["apart"]["all"]  # type: ignore[arg-type]
        assert everything["shared_renamed"]["value"] == pytest.approx(everything["shared_evenly"], abs=0.01)
        verdicts.append(everything["verdict"])
    assert verdicts.count("as by chance") >= 8  # of ten, at 95 %


def test_experts_that_are_chosen_together_are_renamed_together() -> None:
    model = make(num_experts=8, top_k=4)
    for block in (1, 3):
        for gate in model.backbone.trunk.blocks[block].mlp.router.gates:
            with torch.no_grad():
                gate.copy_(torch.randn(2, 16).repeat_interleave(4, dim=0))
    sums = gather(model, Rooms(), range(3))  # type: ignore[arg-type]
    found = figures(sums)
    assert found["groups_of"] == 4
    for use in found["use"].values():
        assert all(task["in_groups"] == {"2": 1.0, "4": 1.0} for task in use["tasks"].values())
    # Two groups: in each block a pair of tasks has its patches' overlap, or what is left of it.
    renamed = _renamed(sums)[:, 0, 0] / (3 * math.prod(GRID) * 4)
    shared = found["apart"]["blocks"]["1"]["pairs"][0]["shared"]["value"]
    assert {round(float(value), 5) for value in renamed} == {round(shared, 5), round(1 - shared, 5)}
    assert figures(gather(make(num_experts=8, top_k=4), Rooms(), range(3)))["groups_of"] == 1  # type: ignore[arg-type]


def test_one_task_of_one_image() -> None:
    found = figures(gather(make(tasks=["semseg"]), Rooms(), [1]))  # type: ignore[arg-type]
    assert found["apart"] == {} and list(found["labels"]) == ["semseg"]
    assert found["labels"]["semseg"]["blocks"]["3"]["semseg"]["information_elsewhere"] is None


def test_a_model_without_experts_is_refused() -> None:
    with pytest.raises(InputError, match=r"^RUN has no blocks with experts \(model.moe_blocks\)"):
        check_routed(make(moe_blocks="none"), "RUN")


def test_even_jaccard_by_drawing() -> None:
    sets = [set(one) for one in combinations(range(6), 2)]
    others = [set(one) for one in combinations(range(6), 3)]
    expected = np.mean([len(x & y) / len(x | y) for x in sets for y in others])
    assert even_jaccard(2, 3, 6) == pytest.approx(expected) and even_jaccard(4, 4, 4) == 1


def test_information_by_hand() -> None:
    assert information(np.array([[2, 0], [0, 2]])) == pytest.approx((1.0, 1.0))
    assert information(np.array([[1, 1], [1, 1]])) == pytest.approx((0.0, 0.0))
    # H(row) 1, H(column) 0.8113 (3/4, 1/4), H(both) 1.5 (1/2, 1/4, 1/4): 0.3113 bits
    assert information(np.array([[2, 0], [1, 1]])) == pytest.approx((0.3113, 0.3113 / 0.8113), abs=1e-4)
    assert information(np.array([[3], [1]])) == (0.0, 0.0)
    assert all(map(math.isnan, information(np.zeros((2, 2)))))


def test_a_patch_has_the_bin_of_most_of_its_labelled_pixels() -> None:
    label = np.array([[3, 3, 5, 5, 9, 255], [2, 255, 4, 4, 255, 255]], np.uint8)
    assert patch_bins(KINDS["argmax"], label, (1, 3), 40).tolist() == [3, 4, IGNORE]  # of equally many the first
    edge = np.array([[0, 0, 0, 1, 255, 255], [0, 0, 0, 0, 1, 255]], np.uint8)
    assert patch_bins(KINDS["sigmoid"], edge, (1, 3), 2).tolist() == [0, 1, IGNORE]  # one edge pixel marks a patch
    assert patch_bins(KINDS["argmax"], label[:1, :2], (1, 3), 40).tolist() == [3, IGNORE, 3]  # smaller than the grid


def test_every_kind_says_what_its_bins_are() -> None:
    for task in TABLE.values():
        kind = KINDS[task.kind]
        names = kind.bins(task, ("a_b", "c"))
        assert 2 <= len(names) <= 254 and len(set(names)) == len(names)
        blank = kind.binned(kind.no_label((2, 3)))
        assert blank.dtype == np.uint8 and blank.shape == (2, 3) and (blank == IGNORE).all()
    metres = np.array([[0.0, 0.5, 1.0, 1.5, 7.9, 8.0, np.nan]], np.float32)
    assert KINDS["identity"].binned(metres).tolist() == [[IGNORE, 0, 1, 2, 6, 7, IGNORE]]
    assert KINDS["identity"].bins(TABLE["depth"], ())[1] == "1 to 1.5 m"


def test_choices_leave_out_prefix_tokens_and_run_no_head() -> None:
    model = make()
    model.heads.forward = None  # type: ignore[assignment, method-assign]
    (one,) = choices(model, [Rooms().load(0).image])
    assert isinstance(one, Choices) and one.chosen_LRTE.shape == (2, 4, 12, E)
    assert (one.chosen_LRTE.sum(axis=-1) == 2).all() and (one.weights_LRTE.argmax(-1) == one.first_LRT).all()
