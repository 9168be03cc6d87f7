"""A decoder from outside the package, which reads three blocks: trained, exported, profiled, refused."""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from m3vit.errors import InputError
from m3vit.models.config import ModelConfig
from m3vit.models.decoders import DECODERS, add_decoder
from m3vit.models.decoders.base import Decoded, Decoder, Features, PerTask, Size, resize
from m3vit.models.multitask import MultiTaskModel
from m3vit.models.trial import try_out
from tests.conftest import TINY, Cli, succeed


class ThreeBlocks(Decoder):
    """A mean over three blocks, mixed by what all tasks share, then a 1x1 convolution each; another one in training."""

    no_hls = "these read three blocks"

    def __init__(self, config: ModelConfig, backbone: Any, *, width: int = 6) -> None:
        super().__init__()
        depth = len(backbone.trunk.blocks)
        self.blocks = (depth - 3, depth - 2, depth - 1)
        self.mix = nn.Linear(backbone.dim, width)
        channels = {task: config.labels.channels(task) for task in config.tasks}
        self.outputs = nn.ModuleDict({task: nn.Conv2d(width, count, 1) for task, count in channels.items()})
        self.training_only = nn.ModuleDict({task: nn.Conv2d(width, count, 1) for task, count in channels.items()})

    def forward(self, features: Features, sizes: Mapping[str, Size]) -> Decoded:
        mean = torch.stack([features.of(block) for block in self.blocks]).mean(0)
        maps = dict(zip(sizes, self.mix(mean).mT.unflatten(-1, features.grid), strict=True))

        def outputs(layers: Any) -> dict[str, Tensor]:
            return {task: resize(layers[task](one), sizes[task]) for task, one in maps.items()}

        return Decoded(outputs(self.outputs), {"deep": outputs(self.training_only)} if self.training else {})


def tap_without_reason(config: ModelConfig, backbone: Any) -> Decoder:
    """A decoder that does not say how it is lowered."""
    return PerTask({task: nn.Identity() for task in config.tasks})


@pytest.fixture
def added() -> Iterator[None]:
    before = dict(DECODERS)
    add_decoder("three", ThreeBlocks)
    yield
    DECODERS.clear()
    DECODERS.update(before)


TRUNK = {"patch_size": 8, "embed_dim": 32, "depth": 4, "num_heads": 2, "mlp_ratio": 2}
SMALL: dict[str, Any] = {"trunk": "vit_tiny_patch16_224", "trunk_args": TRUNK, "num_experts": 4, "top_k": 2}


def make(**changes: Any) -> MultiTaskModel:
    torch.manual_seed(0)
    return MultiTaskModel(ModelConfig(**SMALL | {"image_size": (32, 48)} | changes))


def refused(result: Any, words: str) -> None:
    assert result.returncode == 2 and words in result.stderr and len(result.stderr.splitlines()) == 1, result.stderr


@pytest.mark.slow
def test_the_whole_path_of_one_from_outside(added: None, cli: Cli, tiny_data: Path, tmp_path: Path) -> None:
    run, onnx = tmp_path / "run", tmp_path / "onnx"
    words = ["synthetic-tiny", *TINY, "--model.trunk_args.depth=4", "--model.head=three", "--model.head_args.width=5"]
    words += [f"--data.root={tiny_data}", "--train.epochs=1", "--train.native_losses=[depth]"]
    words += ["--model.tasks=[semseg,depth]"]
    succeed(cli("train", *words, "--out", run))
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    trained = next(line for line in lines if line["kind"] == "train")
    assert {"depth", "depth/deep", "semseg/deep", "balance"} <= set(trained)
    # The export compares with torch itself, the task's graph and those of the backbone and the head alike.
    succeed(cli("export", "onnx", run, "--tasks", "depth", "--one-backbone", "--out", onnx))
    assert json.loads((onnx / "manifest.json").read_text())["parity"]["passed"]
    refused(cli("export", "hls", run, "--out", tmp_path / "hls"), "three heads, and these read three blocks: train")
    succeed(cli("profile", run, "--json", tmp_path / "profile.json"))
    report = json.loads((tmp_path / "profile.json").read_text())
    tokens, shared = 4 * 6, 32 * 5
    for task, channels in (("semseg", 40), ("depth", 1)):
        entry = report["tasks"][task]
        assert entry["macs"]["parts"]["heads"] == tokens * (shared + 5 * channels)
    extra = 6 * (40 + 1)
    assert report["stored"]["parts"]["heads"] == shared + 5 + extra
    assert report["tasks"]["depth"]["activated"]["parts"]["heads"] == shared + 5 + extra
    assert report["stored"]["parts"]["distillation"] == extra
    refused(
        cli("train", *words, "--model.head_stride=8", "--out", tmp_path / "x"), "three heads have a stride of their"
    )
    refused(cli("train", *words, "--model.head_args.depth=8", "--out", tmp_path / "x"), "head three takes width")


def test_features_are_those_after_the_blocks_named(added: None) -> None:
    model, images = make(head="three").eval(), torch.randn(2, 3, 24, 40)
    seen: dict[int, Tensor] = {}
    model.backbone.trunk.blocks[0].register_forward_hook(lambda module, x, y: seen.update({0: y}))
    with torch.no_grad():
        features, _ = model.backbone(images, (0, 2, 3), (0, 2))
        last, _ = model.backbone(images, (0, 2, 3))
    assert list(features.tokens) == [0, 2] and features.grid == (3, 5) and features.patch_size == 8
    assert list(last.tokens) == [3] and last.last.shape == (3, 2, 15, 32)
    assert features.tokens[0].shape == (1, 2, 15, 32), "before the first router the tasks are the same"
    torch.testing.assert_close(features.tokens[0][0], seen[0][:, 1:])
    assert features.of(0).shape == features.last.shape == (3, 2, 15, 32)


def test_one_task_is_what_it_is_among_all(added: None) -> None:
    model, images = make(head="three").eval(), torch.randn(2, 3, 32, 48)
    together = model(images).logits
    for task in model.config.tasks:
        torch.testing.assert_close(model(images, [task]).logits[task], together[task], rtol=1e-4, atol=1e-5)
    assert model(images).auxiliary == {} and list(model.train()(images).auxiliary) == ["deep"]


@pytest.mark.parametrize("head", ["linear", "conv", "pup"])
def test_nothing_of_other_blocks_is_kept(head: str) -> None:
    features, _ = make(head=head).backbone(torch.randn(1, 3, 32, 48), (0, 1))
    assert list(features.tokens) == [3]


def test_refusals(added: None) -> None:
    def fails(words: str, **changes: Any) -> None:
        with pytest.raises(InputError, match=words):
            try_out(ModelConfig(**SMALL | {"image_size": (32, 48)} | changes))

    fails(r"model\.head_args is \{'width': 8\}, and head linear takes none", head="linear", head_args={"width": 8})
    fails("choose from linear, conv, pup, multiscale, taskexpert, three", head="thre")
    fails("it needs pup heads", head="three", distillation=[0])
    fails("reads the blocks 0, 1, -1|reads the blocks -1, 0, 1", head="three", trunk_args={**TRUNK, "depth": 2})
    for name, build, words in (
        ("unsaid", tap_without_reason, "model.head unsaid is no decoder: it has neither token_heads"),
        ("headless", lambda config, backbone: nn.Identity(), "headless is no decoder: its builder returns a Identity"),
        ("bare", lambda config, backbone: Decoder(), "bare is no decoder: .* no Decoder with a forward"),
        ("absent", "m3vit_absent:build", "decoder absent: m3vit_absent:build cannot be imported"),
    ):
        add_decoder(name, build)
        fails(words, head=name)

    class Wrong(ThreeBlocks):
        def forward(self, features: Features, sizes: Mapping[str, Size]) -> Decoded:
            return super().forward(features, dict.fromkeys(sizes))

    add_decoder("wrong", Wrong)
    fails(r"model\.head wrong gives logits of the shapes .*semseg': \(1, 40, 4, 6\).*expected", head="wrong")

    class Failing(ThreeBlocks):
        def forward(self, features: Features, sizes: Mapping[str, Size]) -> Decoded:
            raise KeyError("semseg")

    add_decoder("failing", Failing)
    fails(r"no model can be run with .* head failing \(.*semseg", head="failing")


def test_what_cannot_be_added(added: None) -> None:
    for words, arguments in (
        ("there is a decoder 'linear' already", ("linear", ThreeBlocks)),
        ("cannot be called 'a-b'", ("a-b", ThreeBlocks)),
        ("give a function that builds it", ("ab", "nowhere")),
        ("reads tasks: choose from head_stride, distillation", ("ab", ThreeBlocks, ("tasks",))),
    ):
        with pytest.raises(InputError, match=words):
            add_decoder(*arguments)


def test_onnx_is_refused_with_the_decoders_reason(added: None, tmp_path: Path) -> None:
    from m3vit.export.onnx.package import export_package

    model = make(head="three")
    model.heads.no_onnx = "it draws lots"
    with pytest.raises(InputError, match="cannot export to ONNX: the model has three heads, and it draws lots"):
        export_package(model, tmp_path / "out", info={})


# --- weights under the names of earlier versions --------------------------------------------------------------------


def test_distillation_under_its_former_names_is_read(tmp_path: Path) -> None:
    from m3vit.models.saved import current_names

    model = make(head="pup", distillation=[1])
    state = model.state_dict()
    former = {name.replace("heads.training_only.", "distillation."): value for name, value in state.items()}
    assert set(former) != set(state)
    assert set(current_names(former)) == set(state)
    average = {f"module.{name}": value for name, value in former.items()}
    assert set(current_names(average)) == {f"module.{name}" for name in state}
    assert current_names(state) == state
