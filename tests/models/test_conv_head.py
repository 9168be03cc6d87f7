"""The head `conv`: against loops over pixels, its parameters and MACs by hand, its arguments."""

from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from m3vit.errors import InputError
from m3vit.models.config import ModelConfig
from m3vit.models.decoders.conv import ConvHead
from m3vit.models.multitask import MultiTaskModel
from m3vit.profiling import profile

TRUNK = {"patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 2, "mlp_ratio": 2}
CONFIG = ModelConfig(
    trunk="vit_tiny_patch16_224",
    trunk_args=TRUNK,
    image_size=(24, 40),
    tasks=["semseg", "edge"],
    num_experts=4,
    top_k=2,
    head="conv",
)


@pytest.mark.parametrize(("stride", "unrectified"), [(2, 0), (4, 0), (8, 0), (4, 2), (4, 5)])
def test_head_equals_loops_over_pixels(stride: int, unrectified: int) -> None:
    torch.manual_seed(0)
    (rows, columns), dim, channels, width = (2, 3), 6, 3, 5
    s = 8 // stride
    head = ConvHead(dim, channels, 8, stride, width, 0.5, unrectified)
    with torch.no_grad():
        for parameter in head.parameters():
            parameter.uniform_(-1, 1)
    tokens = torch.randn(2, rows * columns, dim)
    weight = head.output.weight.detach()
    found = head(tokens, (rows, columns), None)
    with torch.no_grad():
        outputs = head.linear(head.norm(tokens)).reshape(2, rows, columns, s, s, width)
        outputs[..., unrectified:].relu_()
    for y in range(rows * s):
        for x in range(columns * s):
            expected = head.output.bias.detach().expand(2, -1).clone()
            for dy in (-1, 0, 1):
                for dx in (-1, 0, 1):
                    if 0 <= y + dy < rows * s and 0 <= x + dx < columns * s:
                        (row, i), (column, j) = divmod(y + dy, s), divmod(x + dx, s)
                        expected += outputs[:, row, column, i, j] @ weight[:, :, dy + 1, dx + 1].T
            torch.testing.assert_close(found[:, :, y, x], expected)
    resized = F.interpolate(found, size=(16, 24), mode="bilinear", align_corners=False)
    torch.testing.assert_close(head(tokens, (rows, columns), (16, 24)), resized)


def test_parameters_and_macs_by_hand() -> None:
    report = profile(replace(CONFIG, head_stride=2, head_args={"width": 6}))
    tokens, s = 3 * 5, 4
    for task, channels in (("semseg", 40), ("edge", 1)):
        entry = report["tasks"][task]
        assert entry["macs"]["parts"]["heads"] == tokens * s * s * (32 * 6 + 9 * 6 * channels)
        parameters = 2 * 32 + 33 * s * s * 6 + (9 * 6 + 1) * channels
        assert entry["activated"]["parts"]["heads"] == parameters


@torch.no_grad()
def test_blocks_before_the_last_are_added_to_it() -> None:
    torch.manual_seed(0)
    config = replace(
        CONFIG, trunk_args=TRUNK | {"depth": 4}, moe_blocks=[2], head_args={"width": 6, "blocks": [0, 2, 3]}
    )
    model, images = MultiTaskModel(config).eval(), torch.randn(2, 3, 24, 40)
    fusion: Any = model.heads.fusion
    for parameter in fusion.parameters():
        parameter.uniform_(-1, 1)
    features, _ = model.backbone(images, (0, 1), (0, 2, 3))
    logits = model(images).logits
    for task_id, task in enumerate(config.tasks):
        total = features.of(3)[task_id]
        for place, block in enumerate((0, 2)):  # before and after the tasks part
            total = total + fusion.linears[place](fusion.norms[place](features.of(block)[task_id]))
        torch.testing.assert_close(logits[task], model.heads[task](total, features.grid, (24, 40)))
        alone = model(images, [task]).logits[task]
        torch.testing.assert_close(alone, logits[task])
        own = {name for name, p in model.heads.named_parameters() if any(p is one for one in model.heads.used_by(task))}
        assert {name.split(".")[0] for name in own} == {task, "fusion"}
    report = profile(config)
    tokens, dim, pixels = 15, 32, 15 * 4
    expected = 2 * tokens * dim**2 + pixels * (dim * 6 + 9 * 6 * 40)
    assert report["tasks"]["semseg"]["macs"]["parts"]["heads"] == expected


def test_a_new_head_predicts_its_bias() -> None:
    model = MultiTaskModel(CONFIG).eval()
    logits = model(torch.zeros(1, 3, 24, 40)).logits
    biases = {task: float(model.heads[task].output.bias.detach().mean()) for task in CONFIG.tasks}
    assert biases["edge"] != 0 == biases["semseg"]
    for task, value in logits.items():
        assert (value - biases[task]).abs().max() < 0.2


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"head_stride": 3}, r"model\.head_stride is 3: give a divisor of the trunk's patch size 8"),
        ({"head_args": {"width": 0}}, r"model\.head_args\.width is 0: give a whole number of 1 to 1024"),
        ({"head_args": {"width": "wide"}}, r"width is 'wide': give a whole number"),
        ({"head_args": {"depth": 2}}, "head conv takes width, unrectified, blocks"),
        ({"head_args": {"width": 6, "unrectified": 7}}, r"unrectified is 7: give a whole number of 0 to 6"),
        ({"head_args": {"blocks": 3}}, "blocks is 3: give how many of the trunk's 2 blocks"),
    ],
)
def test_refusals(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        MultiTaskModel(replace(CONFIG, **changes))
