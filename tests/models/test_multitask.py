"""The whole model: tasks in one pass, trunks, sizes, refusals."""

from typing import Any

import pytest
import torch

from m3vit.errors import InputError
from m3vit.models.config import ModelConfig
from m3vit.models.multitask import MultiTaskModel
from m3vit.training.routing_losses import routing_losses, sums_for

ARGS = {"patch_size": 8, "embed_dim": 32, "depth": 4, "num_heads": 2, "mlp_ratio": 2}
BARE = {**ARGS, "class_token": False, "global_pool": ""}


def make(trunk_args: dict[str, Any] = BARE, **changes: Any) -> MultiTaskModel:
    torch.manual_seed(0)
    defaults: dict[str, Any] = {
        "trunk": "vit_tiny_patch16_224",
        "trunk_args": trunk_args,
        "image_size": (32, 48),
        "num_experts": 4,
        "top_k": 2,
    }
    return MultiTaskModel(ModelConfig(**defaults | changes)).eval()


@pytest.mark.parametrize("router", ["multi", "task_conditioned", "single"])
def test_all_tasks_in_one_pass_equal_one_task_at_a_time(router: str) -> None:
    model = make(router=router)
    images = torch.randn(2, 3, 32, 48)
    together = model(images).logits
    assert {task: tuple(value.shape) for task, value in together.items()} == {
        "semseg": (2, 40, 32, 48),
        "depth": (2, 1, 32, 48),
        "normals": (2, 3, 32, 48),
        "edge": (2, 1, 32, 48),
    }
    for task in model.config.tasks:
        alone = model(images, [task]).logits[task]
        torch.testing.assert_close(alone, together[task], rtol=1e-4, atol=1e-5)  # float32 sum order


def test_reference_and_sorted_execution_agree_in_the_model() -> None:
    model = make()
    images = torch.randn(2, 3, 32, 48)
    expected = model(images).logits
    for block in model.backbone.moe_indices:
        model.backbone.trunk.blocks[block].mlp.execution = "reference"
    for task, value in model(images).logits.items():
        torch.testing.assert_close(value, expected[task], rtol=1e-4, atol=1e-5)  # float32 sum order


def test_blocks_with_experts() -> None:
    assert make().backbone.moe_indices == [1, 3]
    assert make(moe_blocks="none").backbone.moe_indices == []
    assert make(moe_blocks=[0, 2]).backbone.moe_indices == [0, 2]
    dense = make(moe_blocks="none")
    assert dense(torch.randn(1, 3, 32, 48)).routings == []


@pytest.mark.parametrize(
    "trunk_args",
    [
        ARGS,
        BARE,
        {**BARE, "reg_tokens": 2},
        {**ARGS, "no_embed_class": True},
        {**BARE, "init_values": 0.1},
        {**ARGS, "trunk": "deit_tiny_distilled_patch16_224"},
        {**BARE, "embed_norm_layer": "layernorm"},
        {**BARE, "pre_norm": True},
    ],
    ids=[
        "class token",
        "bare",
        "register tokens",
        "class token without position",
        "LayerScale",
        "distilled",
        "embedding norm",
        "norm before blocks",
    ],
)
def test_trunk_equals_timm_when_dense(trunk_args: dict[str, Any]) -> None:
    trunk_args = dict(trunk_args)
    name = trunk_args.pop("trunk", "vit_tiny_patch16_224")
    model = make(trunk_args, trunk=name, moe_blocks="none", tasks=["depth"])
    with torch.no_grad():  # tokens and positions start at or near zero: make them matter
        for parameter_name, parameter in model.named_parameters():
            if "token" in parameter_name or "pos_embed" in parameter_name:
                parameter.normal_()
    images = torch.randn(2, 3, 32, 48)
    trunk = model.backbone.trunk
    expected = trunk.forward_features(images)[:, trunk.num_prefix_tokens :]
    features, _ = model.backbone(images, (0,))
    torch.testing.assert_close(features.last[0], expected, rtol=1e-5, atol=1e-6)  # float32 sum order


def test_other_image_sizes_and_their_limits() -> None:
    model = make()
    assert model(torch.randn(1, 3, 48, 40), ["depth"]).logits["depth"].shape == (1, 1, 48, 40)
    with pytest.raises(InputError, match=r"30x48.*patch size 8"):
        model(torch.randn(1, 3, 30, 48))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"trunk": "resnet18"}, "family resnet"),
        ({"experts_per_task": {"depth": [0]}}, "at least top_k"),
        ({"experts_per_task": {"depth": [0, 4]}}, "0 to 3"),
        ({"experts_per_task": {"saliency": [0, 1]}}, "name tasks of the model"),
        ({"experts_per_task": {"depth": [0, 1]}, "router": "single"}, "a router that knows the task"),
        ({"experts_per_task": {"depth": [0, 1]}, "init": "upcycle"}, "every task must be able to reach"),
        ({"router_noise_kind": "none"}, "choose from fixed, learned"),
        ({"expert_ratio": 0.001}, "no hidden unit"),
        (
            {"trunk": "swin_tiny_patch4_window7_224", "trunk_args": {}, "image_size": (224, 224)},
            "not a plain vision transformer",
        ),
        ({"trunk": "vit_smal_patch16_224"}, "not a timm model: give one such as vit_small_patch16_224,"),
        ({"trunk": "gpt"}, "not a timm model: give one such as vit_small_patch16_224,"),
        ({"tasks": ["depth", "flow"]}, "unknown task flow: choose from semseg"),
        ({"tasks": []}, "at least one task"),
        ({"top_k": 5}, "give 1 to model.num_experts"),
        ({"router": "vote"}, "choose from multi, task_conditioned, single"),
        ({"head_stride": 3}, "divisor of the trunk's patch size 8"),
        ({"image_size": (30, 48)}, "not a multiple of the patch size"),
        ({"moe_blocks": [9]}, "blocks 0 to 3"),
        ({"trunk_args": {"patch_sise": 8}}, "timm cannot build"),
        ({"trunk_args": {**BARE, "patch_size": [8, 16]}}, "square patch"),
        ({"trunk_args": {**BARE, "in_chans": 1}}, "3 input channels"),
        ({"trunk_args": {**BARE, "patch_drop_rate": 0.5}}, "no patch may be dropped"),
        ({"trunk": "vit_small_patch16_18x2_224", "trunk_args": {}, "image_size": (32, 32)}, "no part of its own"),
    ],
)
def test_refusals(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        make(**changes)


def test_one_router_for_all_tasks_runs_the_trunk_once() -> None:
    torch.manual_seed(0)
    model, images = make(router="single").train(), torch.randn(2, 3, 32, 48)
    seen: list[int] = []
    for block in model.backbone.trunk.blocks:
        block.attn.register_forward_hook(lambda _, inputs, output: seen.append(len(output)))
    output = model(images)
    assert seen == [2] * 4, "two images in each block, not two for each of four tasks"
    for routing in output.routings:
        assert routing.scores_RNE.shape == (4, 48, 4) and routing.expert_ids_RNK.shape == (4, 48, 2)
    # what is summed over tasks is as if each had been run
    one = model(images, ["depth"]).routings
    for loss, times in (("balance", 4), ("switch", 4), ("z", 1)):
        all_tasks, alone = (routing_losses(sums_for(found, [loss]), [loss])[loss] for found in (output.routings, one))
        torch.testing.assert_close(all_tasks, times * alone)
