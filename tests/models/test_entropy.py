"""Coefficients found by entropy: its value and gradient, that it falls, what keeps 0.3, and what is refused."""

import json
import signal
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from subprocess import CompletedProcess
from typing import Any

import pytest
import torch
from torch import Tensor

from m3vit.api import configure
from m3vit.data.loading import unlabelled
from m3vit.data.opening import open_split
from m3vit.errors import InputError
from m3vit.kinds import KINDS
from m3vit.models.config import ModelConfig
from m3vit.models.entropy import START, Blend, Found, find_coefficients, report
from m3vit.models.from_run import dense_tensors, read_trained
from m3vit.models.initialise import new_model, not_taken
from m3vit.models.merging import began_from, layer_of, merge
from m3vit.models.multitask import MultiTaskModel
from m3vit.normalisation import IMAGENET
from m3vit.run_folder import save_model
from m3vit.tasks import kind_of
from m3vit.training.loop import train
from m3vit.training.stopping import Stopped
from tests.models.test_from_run import config, trained

TASKS = ("semseg", "edge", "depth")
LAYERS = ["embed", "blocks.0", "blocks.1", "blocks.2", "blocks.3"]


@pytest.fixture(scope="module")
def family(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of a dense run, `base`, and one for each of three tasks whose weights all differ from its."""
    root = tmp_path_factory.mktemp("entropy")
    trained(root / "base", moe_blocks="none", tasks=["normals"])
    for seed, task in enumerate(TASKS):
        model = trained(root / task, moe_blocks="none", tasks=[task])
        torch.manual_seed(10 + seed)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(torch.randn_like(parameter) * 0.1)
        save_model(root / task, model, epoch=1)
    return root


def merging(family: Path, tasks: tuple[str, ...] = TASKS, **changes: Any) -> ModelConfig:
    defaults: dict[str, Any] = {"num_experts": 2 * len(tasks), "top_k": 2, "merge_steps": 20}
    defaults |= {"init": f"merge:[{', '.join(str(family / task) for task in tasks)}]", "merge_images": 2}
    defaults["tasks"] = [task.replace("base", "normals") for task in tasks]
    defaults |= {"weights": str(family / "base" / "model.safetensors"), "merge_coefficients": "entropy"}
    return config(**defaults | changes)


def pictures(_: Any = None) -> Iterator[Tensor]:
    generator = torch.Generator().manual_seed(1)
    while True:
        yield torch.randn(2, 3, 32, 48, generator=generator)


def blend_of(settings: ModelConfig, root: Path) -> tuple[Blend, MultiTaskModel]:
    model = MultiTaskModel(settings)
    runs = [read_trained(str(root / task)) for task in settings.tasks]
    base = began_from(model)
    assert base is not None
    _, taken = merge(model, runs, base, dict.fromkeys(LAYERS, [START] * len(runs)))
    return Blend(model, runs, base, taken, LAYERS), model


@pytest.mark.parametrize(("name", "channels"), [("argmax", 5), ("sigmoid", 1)])
def test_entropy_of_a_pixel(name: str, channels: int) -> None:
    logits = torch.randn(2, channels, 3, 4, dtype=torch.float64) * 5
    shares = logits.softmax(dim=1) if channels > 1 else torch.cat([logits.sigmoid(), 1 - logits.sigmoid()], dim=1)
    expected = torch.distributions.Categorical(probs=shares.movedim(1, -1)).entropy()
    torch.testing.assert_close(KINDS[name].entropy(logits), expected)
    certain = KINDS[name].entropy(torch.full((1, channels, 1, 1), 200.0) * torch.eye(channels)[0].view(1, -1, 1, 1))
    assert float(certain) == 0, "and no NaN"


def test_layers_are_blocks_and_what_stands_around_them() -> None:
    assert list(dict.fromkeys(layer_of(name) for name in dense_tensors(MultiTaskModel(config())))) == LAYERS
    names = ("cls_token", "pos_embed", "norm_pre.weight", "blocks.11.ls1.gamma")
    assert [layer_of(name) for name in names] == ["embed", "embed", "embed", "blocks.11"]


def test_it_is_the_entropy_of_the_merged_model(family: Path) -> None:
    """Of dense models to rounding; with experts, the random part of the gates is told from it."""
    numbers = {layer: [0.1 * place, 0.4, -0.1 * place] for place, layer in enumerate(LAYERS)}
    images = next(pictures())
    for moe_blocks, tolerance in (("none", 1e-5), ("odd", 2e-2)):
        settings = merging(family, moe_blocks=moe_blocks)
        blend, model = blend_of(settings, family)
        runs = [read_trained(str(family / task)) for task in TASKS]
        merge(model, runs, began_from(model), numbers)
        assert blend.tasks == [["semseg"], ["edge"], []]
        with torch.no_grad():
            logits = model.eval()(images, native=TASKS).logits
            expected = sum(kind_of(task).entropy(logits[task]).mean() for task in ("semseg", "edge"))
            found = blend.entropy(torch.tensor([numbers[layer] for layer in LAYERS]), images)
        torch.testing.assert_close(found, expected, rtol=tolerance, atol=0)


@pytest.mark.parametrize("moe_blocks", ["none", "odd"])
def test_gradient_against_differences(family: Path, moe_blocks: str) -> None:
    blend, _ = blend_of(merging(family, moe_blocks=moe_blocks), family)
    blend.model.double()
    blend.shared = {name: (row, b.double(), d.double()) for name, (row, b, d) in blend.shared.items()}
    blend.own = [{name: value.double() for name, value in own.items()} for own in blend.own]
    images, step = next(pictures()).double(), 1e-5
    coefficients = (torch.rand(len(LAYERS), 3, dtype=torch.float64)).requires_grad_()
    value = blend.add_gradient(coefficients, images)
    assert value == pytest.approx(float(blend.entropy(coefficients.detach(), images)))
    assert coefficients.grad is not None and (coefficients.grad != 0).all()
    for row in range(len(LAYERS)):
        for run in range(3):
            ends = []
            for sign in (1, -1):
                moved = coefficients.detach().clone()
                moved[row, run] += sign * step
                ends.append(float(blend.entropy(moved, images)))
            slope = (ends[0] - ends[1]) / (2 * step)
            assert float(coefficients.grad[row, run]) == pytest.approx(slope, rel=1e-5, abs=1e-9)


def test_entropy_falls_and_a_run_without_any_keeps_its_start(family: Path) -> None:
    seen: list[tuple[int, int, str]] = []
    found = find_coefficients(merging(family), pictures, progress=lambda *values: seen.append(values))
    assert found.entropy[1] < found.entropy[0]
    assert found.runs == list(TASKS) and found.held == ["depth"] and list(found.layers) == LAYERS
    for numbers in found.layers.values():
        assert numbers[2] == pytest.approx(START)
        # Adam moves by its rate at most, while gradients keep their sign.
        assert all(0 < abs(number - START) <= 20 * 1e-3 * 1.01 for number in numbers[:2])
    assert [done for done, *_ in seen] == list(range(1, 21)) and seen[0][2].startswith("entropy ")
    assert found == find_coefficients(merging(family), pictures), "the same once more"
    first = find_coefficients(merging(family, merge_steps=1), pictures)
    assert all(abs(number - START) < 1.01e-3 for numbers in first.layers.values() for number in numbers)


def test_the_model_has_what_was_found(family: Path) -> None:
    settings = merging(family, moe_blocks="none")
    found = Found({layer: [0.1, 0.2, 0.3] for layer in LAYERS}, list(TASKS), ["depth"], (2.0, 1.0), 20, 2)
    found.layers["blocks.2"] = [0.9, 0.2, 0.3]
    model = new_model(settings, coefficients=found)
    base, *runs = (read_trained(str(family / name)).state for name in ("base", *TASKS))
    for name in ("backbone.trunk.blocks.2.attn.qkv.weight", "backbone.trunk.patch_embed.proj.bias"):
        numbers = found.layers[layer_of(name.removeprefix("backbone.trunk."))]
        expected = base[name] + sum(c * (run[name] - base[name]) for c, run in zip(numbers, runs, strict=True))
        torch.testing.assert_close(model.state_dict()[name], expected)
    assert model.origins["coefficients"] == json.loads(json.dumps(found.plain()))
    assert not_taken(model) == [report(found.plain())]
    assert "blocks.2   0.900   0.200   0.300" in report(found.plain())
    assert "entropy 2.0000 at first, then 1.0000" in report(found.plain())


@pytest.mark.parametrize(
    ("tasks", "changes", "words"),
    [
        (("depth", "base"), {}, "none of depth, normals has predictions with an entropy"),
        (("semseg", "edge"), {"weights": ""}, "give these, model.weights FILE or model.pretrained"),
        (("semseg", "edge"), {"num_experts": 8, "top_k": 6}, "are 4 for each of the 2 runs"),
        (("semseg", "edge"), {"head": "conv"}, "none of semseg, edge has predictions with an entropy"),
        (("semseg", "edge"), {"merge_coefficients": "guess"}, "merge_coefficients is 'guess', expected"),
        (("semseg", "edge"), {"merge_steps": 0}, "model.merge_steps is 0: give a number of 1 to"),
    ],
)
def test_refusals(family: Path, tasks: tuple[str, ...], changes: dict[str, Any], words: str) -> None:
    def no_image(_: Any) -> Iterator[Tensor]:
        raise AssertionError("refused before an image is read")
        yield

    with pytest.raises(InputError, match=words):
        find_coefficients(merging(family, tasks, **changes), no_image)


def test_runs_that_do_not_mix_are_told(family: Path) -> None:
    def overflowing(_: Any) -> Iterator[Tensor]:
        yield torch.full((2, 3, 32, 48), float("inf"))

    with pytest.raises(InputError, match="that of merged predictions is nan in step 1: the runs do not mix"):
        find_coefficients(merging(family), overflowing)


def test_images_without_labels(make_data: Callable[..., Path], tmp_path: Path) -> None:
    split = open_split("nyud", make_data(tmp_path, train=5), "train", ["depth"])

    def first(count: int, seed: int) -> list[Tensor]:
        batches = unlabelled(split, (32, 48), IMAGENET, 2, seed)
        return [next(batches) for _ in range(count)]

    once = first(5, 0)
    assert all(batch.shape == (2, 3, 32, 48) and batch.dtype == torch.float32 for batch in once)
    assert all(torch.equal(a, b) for a, b in zip(once, first(5, 0), strict=True))
    assert not torch.equal(once[0], first(1, 1)[0])
    sums = [round(float(image.sum()), 2) for batch in once for image in batch]
    assert len(set(sums[:5])) == 5 and sorted(sums[:5]) == sorted(sums[5:]), "each once, then each once more"
    split.path(2, "image").write_bytes(b"no picture")
    with pytest.raises(InputError, match="cannot be read"):
        first(3, 0)
    skipping = unlabelled(split, (32, 48), IMAGENET, 2, 0, skip=True)
    assert len({round(float(image.sum()), 2) for _ in range(4) for image in next(skipping)}) == 4
    for index in range(5):
        split.path(index, "image").write_bytes(b"no picture")
    with pytest.raises(InputError, match="cannot be read"):
        next(unlabelled(split, (32, 48), IMAGENET, 2, 0, skip=True))


def test_on_the_command_line(
    cli: Callable[..., CompletedProcess], family: Path, make_data: Callable[..., Path], tmp_path: Path
) -> None:
    data = make_data(tmp_path / "data")
    settings = merging(family)
    keys = [f"--model.{key}={getattr(settings, key)}" for key in ("trunk", "init", "weights", "merge_steps", "top_k")]
    keys += ["--model.merge_coefficients=entropy", "--model.merge_images=2", "--model.tasks=[semseg,edge,depth]"]
    keys += [f"--model.trunk_args={json.dumps(settings.trunk_args)}", "--model.image_size=[32,48]"]
    keys += ["--model.num_experts=6", "--model.head=linear", "--model.head_args={}", f"--data.root={data}"]
    done = cli("init", "synthetic-tiny", *keys, "--out", tmp_path / "run")
    assert done.returncode == 0, done.stderr
    assert "coefficients found in 20 steps of 2 images without labels: entropy" in done.stdout
    assert "kept at 0.3, for no entropy of theirs can be taken: depth" in done.stdout
    initialised = json.loads((tmp_path / "run" / "model.json").read_text())["initialised"]
    assert list(initialised["coefficients"]["layers"]) == LAYERS
    assert initialised["from"]["heads"] == "merge:[semseg, edge, depth]"
    for more, words in (
        ((), "is not empty: continue it with m3vit train --resume"),
        (("--model.merge_coefficients=[0.3,0.3,0.3]",), "--model.merge_steps would have no effect"),
        (("--model.merge_coefficients=guess",), "model.merge_coefficients is guess: give list[float] or entropy"),
        (("--model.init=random",), "--model.merge_coefficients would have no effect (model.init is random"),
    ):
        done = cli("init", "synthetic-tiny", *keys, *more, "--out", tmp_path / "run")
        assert done.returncode == 2 and words in done.stderr and done.stderr.count("\n") == 1, done.stderr


@pytest.mark.parametrize("kind", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize("step", [3, 20])
def test_a_signal_ends_the_search(
    kind: signal.Signals, step: int, family: Path, make_data: Callable[..., Path], tmp_path: Path
) -> None:
    """Also one that comes in its last step; the run folder is not begun, so that the same command starts it again."""
    seen = []

    def progress(done: int, of: int, words: str) -> None:
        seen.append(done)
        if done == step and words.startswith("entropy"):
            signal.raise_signal(kind)

    data = make_data(tmp_path / "data")
    settings = configure("synthetic-tiny", {"data.root": str(data), "train.batch_size": 4})
    before = signal.getsignal(kind)
    with pytest.raises(Stopped, match=f"stopped by {kind.name} before training began: start it again") as stopped:
        train(replace(settings, model=merging(family)), tmp_path / "run", progress=progress)
    assert stopped.value.exit_code == 128 + kind and seen == list(range(1, step + 1))
    assert not (tmp_path / "run").exists() and signal.getsignal(kind) == before


def test_only_merging_looks_for_them(family: Path) -> None:
    settings = replace(merging(family), init="random", weights="")
    settings.check()
    assert "coefficients" not in new_model(settings).origins
