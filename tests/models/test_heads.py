"""PUP heads and distillation: against an obvious reference, at odd sizes, in the loss."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from m3vit.errors import InputError
from m3vit.export.hls.leaf import lower
from m3vit.models.config import ModelConfig
from m3vit.models.decoders.pup import Distillation, PupHead, stage_count
from m3vit.models.multitask import MultiTaskModel
from m3vit.training.config import Config
from m3vit.training.step import step_losses

ARGS = {"patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 2, "mlp_ratio": 2}


def make(**changes: Any) -> MultiTaskModel:
    torch.manual_seed(0)
    defaults: dict[str, Any] = {
        "trunk": "vit_tiny_patch16_224",
        "trunk_args": ARGS,
        "image_size": (32, 48),
        "num_experts": 4,
        "top_k": 2,
        "head": "pup",
    }
    return MultiTaskModel(ModelConfig(**defaults | changes))


def count(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def randomise(module: nn.Module) -> None:
    """Give norms scales, shifts and statistics that matter."""
    with torch.no_grad():
        for tensor in (*module.parameters(), *module.buffers()):
            if tensor.ndim == 1:
                tensor.uniform_(0.5, 1.5)


def test_parameters_by_hand() -> None:
    # LayerNorm 2 x 384; 3x3 convolutions with bias, and BatchNorm's 2 x 256; 1x1 convolution to 40 classes.
    first, other = 9 * 384 * 256 + 256 + 512, 9 * 256 * 256 + 256 + 512
    assert count(PupHead(384, 40, 16, 0.0)) == 768 + first + 3 * other + 257 * 40


@pytest.mark.parametrize("training", [False, True])
def test_head_equals_the_published_steps(training: bool) -> None:
    # Norm; convolution, BatchNorm, ReLU and x2, three times (strides 16, 8, 4); the same at stride 2; 1x1; x2.
    torch.manual_seed(0)
    head = PupHead(24, 5, 16, bias=0.5)
    randomise(head)
    tokens = torch.randn(2, 3 * 4, 24)
    x = F.layer_norm(tokens, (24,), head.norm.weight, head.norm.bias, eps=1e-6)
    x = x.transpose(1, 2).reshape(2, 24, 3, 4)
    stages: list[Any] = list(head.stages)
    for index, (conv, norm, _) in enumerate(stages):
        x = F.conv2d(x, conv.weight, conv.bias, padding=1)
        mean, variance = (norm.running_mean, norm.running_var) if not training else (None, None)
        x = F.batch_norm(x, mean, variance, norm.weight, norm.bias, training=training).relu()
        if index < 3:
            x = F.interpolate(x, size=(2 * x.shape[2], 2 * x.shape[3]), mode="bilinear", align_corners=False)
    x = F.conv2d(x, head.output.weight, head.output.bias)
    assert len(stages) == 4 and x.shape == (2, 5, 24, 32)
    head.train(training)
    torch.testing.assert_close(head(tokens, (3, 4), None), x)  # at stride 2
    x = F.interpolate(x, size=(48, 64), mode="bilinear", align_corners=False)
    torch.testing.assert_close(head(tokens, (3, 4), (48, 64)), x)


@pytest.mark.parametrize(("patch", "stages"), [(1, 1), (2, 1), (4, 2), (8, 3), (14, 4), (16, 4), (32, 5)])
def test_stages_follow_the_patch_size(patch: int, stages: int) -> None:
    head = PupHead(8, 3, patch, 0.0).eval()
    assert len(head.stages) == stage_count(patch) == stages
    tokens, size = torch.randn(1, 6, 8), (2 * patch, 3 * patch)
    assert head(tokens, (2, 3), size).shape == (1, 3, *size)
    features = head.features(tokens, (2, 3))
    assert [tuple(feature.shape[2:]) for feature in features] == [(2 << i, 3 << i) for i in range(stages)]
    if patch == 14:
        with pytest.raises(InputError, match=r"train\.native_losses.*patch size 14"):
            head(tokens, (2, 3), None)
    else:
        assert head(tokens, (2, 3), None).shape[2:] == features[-1].shape[2:]


def balance_share(task: int, count: int, b: Tensor) -> Tensor:
    """The published weights, written out for each number of tasks (M3ViT's code: models/models.py)."""
    written_out: dict[int, list[Tensor]] = {
        2: [b, 1 - b],
        3: [b, (1 - b) / 2, (1 - b) / 2],
        4: [b / 2, b / 2, (1 - b) / 2, (1 - b) / 2],
        5: [b / 2, b / 2, (1 - b) / 3, (1 - b) / 3, (1 - b) / 3],
    }
    return written_out[count][task]


@pytest.mark.parametrize(("tasks", "size"), [(2, (8, 12)), (3, (8, 8)), (4, (4, 8)), (5, (8, 4)), (2, (6, 9))])
def test_distillation_equals_the_published_steps(tasks: int, size: tuple[int, int]) -> None:
    torch.manual_seed(0)
    module = Distillation([2, 1, 3, 1, 4][:tasks], [0.0] * tasks).eval()
    randomise(module)
    features = [torch.randn(2, 256, *size) for _ in range(tasks)]

    def run(conv: Any, norm: Any, x: Tensor) -> Tensor:
        return norm(conv(x))

    balance: Any = module.balance
    x = run(balance[0], balance[1], torch.cat(features, dim=1)).relu()
    b = run(balance[3], balance[4], x).sigmoid()
    mixed = torch.cat([feature * balance_share(i, tasks, b) for i, feature in enumerate(features)], dim=1)
    mix, downs, ups = (list(part) for part in (module.mix, module.down, module.up))
    sizes = []
    x = run(mix[0], mix[1], mixed).relu()
    for down in downs:
        sizes.append(x.shape[2:])
        layers: Any = down
        x = run(layers[0], layers[1], x).relu()
    for up, norm, wanted, last in zip(ups, module.up_norms, sizes[::-1], (False, True), strict=True):
        x = F.conv_transpose2d(x, up.weight, up.bias, stride=2, padding=1, output_padding=1)  # type: ignore[arg-type]
        x = norm(x[..., : wanted[0], : wanted[1]])
        x = x.sigmoid() if last else x.relu()
    attended = torch.cat([feature * (1 + x) for feature in features], dim=1)
    results = module(features)
    for index, result in enumerate(results):
        output: Any = module.outputs[index]
        torch.testing.assert_close(result, output[3](run(output[0], output[1], attended).relu()))
    assert [tuple(result.shape) for result in results] == [(2, c, *size) for c in [2, 1, 3, 1, 4][:tasks]]


def test_distilled_outputs_exist_in_training_of_all_tasks_only() -> None:
    model, images = make(distillation=[1, 0]), torch.randn(2, 3, 24, 40)
    output = model(images, native=["depth"])
    assert list(output.auxiliary) == ["distilled1", "distilled0"]
    for level, stride in ((0, 4), (1, 2)):
        assert output.auxiliary[f"distilled{level}"]["semseg"].shape == (2, 40, 24, 40)
        assert output.auxiliary[f"distilled{level}"]["depth"].shape == (2, 1, 24 // stride, 40 // stride)
    assert model(images, ["depth"]).auxiliary == {}
    assert model.eval()(images).auxiliary == {}


def test_heads_do_not_change_with_distillation() -> None:
    plain, distilled, images = make(), make(distillation=[0]), torch.randn(2, 3, 32, 48)
    assert not any("training_only" in name for name in plain.state_dict())
    distilled.load_state_dict(plain.state_dict(), strict=False)
    order = ["edge", "semseg", "normals", "depth"]
    expected, found = plain(images, order).logits, distilled(images, order)
    assert list(found.logits) == order and list(found.auxiliary["distilled0"]) == plain.config.tasks
    for task, value in found.logits.items():
        torch.testing.assert_close(value, expected[task])


def test_losses_of_distilled_outputs_weigh_as_their_tasks_do() -> None:
    config = Config()
    config.train.task_weights = {"edge": 7.0}
    model = make(tasks=["depth", "edge"], distillation=[0, 1])
    config.model = model.config
    generator = torch.Generator().manual_seed(0)
    labels = {
        "depth": torch.rand(2, 32, 48, generator=generator) + 1,
        "edge": (torch.rand(2, 32, 48, generator=generator) > 0.9).float(),
    }
    total, losses = step_losses(config, model, torch.randn(2, 3, 32, 48, generator=generator), labels)
    names = ["depth", "edge", "depth/distilled0", "edge/distilled0", "depth/distilled1", "edge/distilled1", "balance"]
    assert list(losses) == names
    weights = [1, 7, 1, 7, 1, 7, 0.01]
    expected = sum(weight * float(losses[name].detach()) for weight, name in zip(weights, names, strict=True))
    assert float(total.detach()) == pytest.approx(expected, rel=1e-5)  # float32 sum order
    total.backward()  # type: ignore[no-untyped-call]
    without = [name for name, parameter in model.named_parameters() if parameter.grad is None]
    assert without == []


def test_batch_norm_becomes_synchronised() -> None:
    model, images = make(distillation=[0]).eval(), torch.randn(1, 3, 32, 48)
    expected = model(images).logits["normals"]
    converted = nn.SyncBatchNorm.convert_sync_batchnorm(model)
    assert not any(type(module) is nn.BatchNorm2d for module in converted.modules())
    torch.testing.assert_close(converted.eval()(images).logits["normals"], expected)


def test_hls_refuses_pup_heads() -> None:
    with pytest.raises(InputError, match="pup heads, and the FPGA flow has linear and conv ones"):
        lower(make())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"head": "cup"}, "choose from linear, conv, pup"),
        ({"head": "linear", "distillation": [0]}, "needs pup heads and two tasks or more"),
        ({"tasks": ["depth"], "distillation": [0]}, r"give --model\.distillation=\[\]"),
        ({"distillation": [2]}, r"is \[2\]: give each level once.*patch size 8 have: 0, 1"),
        ({"distillation": [0, 0]}, "give each level once"),
    ],
)
def test_refusals(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        make(**changes)
