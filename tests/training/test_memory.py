"""The predicted memory of a training step against that of a real one, in which routers choose."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch.distributed._tools.mem_tracker import MemTracker

from m3vit.errors import InputError
from m3vit.models.config import ModelConfig
from m3vit.models.initialise import new_model
from m3vit.training.config import Config, TrainConfig
from m3vit.training.losses import BatchCounts
from m3vit.training.memory import GIB, device_bytes, predict, predict_step, said
from m3vit.training.optim import make_optimizer
from m3vit.training.step import stand_in, step_losses

TRUNK = {"patch_size": 8, "embed_dim": 48, "depth": 3, "num_heads": 3, "mlp_ratio": 4}
CONFIG = Config(
    ModelConfig(
        trunk="vit_tiny_patch16_224",
        trunk_args=TRUNK,
        image_size=(48, 64),
        tasks=["semseg", "depth"],
        moe_blocks=[1],
        num_experts=4,
        top_k=2,
        head="linear",
        head_stride=4,
    )
)


def measured(config: Config, images: int) -> int:
    """Return the tensors' bytes at the peak of real steps, the second with the optimiser's state there."""
    torch.manual_seed(0)
    model = new_model(config.model).train()
    model.backbone.checkpoint_activations = config.train.checkpoint_activations
    optimizer = make_optimizer(config.train, model)
    pixels = torch.randn(images, 3, *config.model.image_size)
    labels = stand_in(config, torch.device("cpu")).labels
    labels = {name: one.expand(images, *one.shape[1:]).clone() for name, one in labels.items()}
    tracker = MemTracker()
    tracker.track_external(model, optimizer, pixels, *labels.values())
    bf16 = config.train.precision == "bf16-mixed"
    with tracker:
        for _ in range(2):
            tracker.reset_mod_stats()
            optimizer.zero_grad()
            with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
                loss, _ = step_losses(config, model, pixels, labels, counts=BatchCounts(labels))
            loss.backward()
            optimizer.step()
    return int(tracker.get_tracker_snapshot("peak")[torch.device("cpu")]["Total"])


@pytest.mark.slow
@pytest.mark.parametrize(
    "settings",
    [{}, {"precision": "bf16-mixed"}, {"checkpoint_activations": True}, {"optimizer": "sgd"}],
    ids=str,
)
def test_prediction_is_near_a_real_step(settings: dict[str, Any]) -> None:
    config = replace(CONFIG, train=TrainConfig(batch_size=6, **settings))
    assert predict_step(config, 6).total == pytest.approx(measured(config, 6), rel=0.15)


@pytest.mark.slow
def test_parts_and_what_is_frozen() -> None:
    config = replace(CONFIG, train=TrainConfig(batch_size=8))
    plain = predict_step(config, 8)
    half = predict_step(replace(config, train=TrainConfig(batch_size=8, accumulate=2)), 8)
    assert half.activations < 0.6 * plain.activations and half.gradients == plain.optimiser / 2
    frozen = predict_step(replace(config, train=TrainConfig(batch_size=8, freeze=["embed", "blocks.0-1"])), 8)
    assert frozen.weights == plain.weights and frozen.optimiser < plain.optimiser
    assert frozen.activations < plain.activations
    each = predict_step(replace(config, train=TrainConfig(batch_size=8, weighting="pcgrad")), 8)
    assert each.activations < plain.activations and each.gradients >= plain.optimiser, "a row for each of two tasks"
    several = predict_step(replace(config, train=TrainConfig(batch_size=8, budgets=2)), 8)
    assert plain.total + several.gradients < several.total < 3 * plain.total, "the second pass learns from the first"
    with pytest.raises(InputError, match="fsdp is not predicted"):
        predict_step(replace(config, train=TrainConfig(strategy="fsdp")), 8)


@pytest.mark.slow
def test_the_largest_batch_fits_and_one_more_does_not() -> None:
    config = replace(CONFIG, train=TrainConfig(batch_size=4))
    found = predict(config, "1.05GB")
    room = (1.05 * GIB - GIB) * 0.92
    assert 4 < found["largest_batch"] < 500
    largest = predict_step(config, found["largest_batch"]).total
    assert 0.94 * room < largest < 1.02 * room
    assert f"train.batch_size {found['largest_batch']}" in said(found)
    assert "not even one image" in said(predict(config, "1GB"))


def test_devices() -> None:
    assert device_bytes("a100-40gb") == device_bytes("40GB") == 40 * GIB and device_bytes("1.5 GiB") == 1.5 * GIB
    with pytest.raises(InputError, match=r"--device A100: give one of T4, .*, or its memory, such as 24GB"):
        device_bytes("A100")
