"""Trunks: timm's models against our forward, other image sizes, export of positions, weights from files, refusals."""

import json
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from safetensors.torch import save_file
from torch import nn

from m3vit.errors import InputError
from m3vit.models.config import ModelConfig
from m3vit.models.initialise import new_model
from m3vit.models.multitask import MultiTaskModel
from m3vit.models.pretrained import RUN_PREFIX
from tests.models.grids import assert_exported_at_any_grid

SMALL = {"embed_dim": 48, "depth": 2, "num_heads": 2}
NATIVE, OTHER = (3, 4), (5, 2)  # patch grids (rows, columns)

# name: (what it adds, patch size, arguments)
TRUNKS: dict[str, tuple[str, int, dict[str, Any]]] = {
    "vit_tiny_patch16_224": ("class token, learned positions", 16, {}),
    "vit_small_patch8_224": ("patch 8", 8, {}),
    "vit_base_patch16_clip_224": ("norm before the blocks", 16, {}),
    "vit_medium_patch16_reg4_gap_256": ("registers, positions of patches alone", 16, {}),
    "deit_tiny_distilled_patch16_224": ("distillation token", 16, {}),
    "deit3_small_patch16_224": ("LayerScale, class token without position", 16, {}),
    "vit_small_patch14_dinov2": ("patch 14", 14, {}),
    "vit_small_patch14_reg4_dinov2": ("registers", 14, {}),
    "vit_giant_patch14_dinov2": ("SwiGLU, packed", 14, {}),
    "aimv2_large_patch14_224": ("SwiGLU, RMS norm, no class token", 14, {}),
    "vit_small_patch16_36x1_224": ("stochastic depth", 16, {"drop_path_rate": 0.1}),
    "vit_so150m_patch16_reg4_map_256": ("attention pooling, which we drop", 16, {}),
    "eva02_tiny_patch14_224": ("rotary and learned positions, SwiGLU with a norm", 14, {}),
    "eva_giant_patch14_224": ("Eva with learned positions", 14, {}),
    "vit_small_patch16_dinov3": ("rotary positions of normalised coordinates, registers", 16, {}),
    "vit_small_patch16_rope_mixed_224": ("rotary positions learned for each block", 16, {}),
    "vit_pe_core_tiny_patch16_384": ("rotary and learned positions, norm before the blocks", 16, {}),
}


def size(grid: tuple[int, int], patch: int) -> tuple[int, int]:
    return grid[0] * patch, grid[1] * patch


def make(name: str, **changes: Any) -> MultiTaskModel:
    torch.manual_seed(0)
    patch, arguments = TRUNKS.get(name, ("", 16, {}))[1:]
    defaults: dict[str, Any] = {
        "trunk": name,
        "trunk_args": {**SMALL, **arguments, **changes.pop("args", {})},
        "image_size": size(NATIVE, patch),
        "tasks": ["depth", "edge"],
        "num_experts": 4,
        "top_k": 2,
        "head_stride": patch // 2,
    }
    model = new_model(ModelConfig(**defaults | changes))
    shake(model)
    return model.eval()


@torch.no_grad()
def shake(model: nn.Module) -> None:
    """Make tokens, positions, scales and norms matter: they start at or near 0 or 1."""
    for name, parameter in model.named_parameters():
        if "token" in name or "pos_embed" in name:
            parameter.normal_()
        elif "gamma" in name or "norm" in name or name.endswith("bias"):
            parameter.add_(torch.rand_like(parameter))


@pytest.mark.parametrize("name", TRUNKS)
def test_dense_trunk_equals_timm(name: str) -> None:
    model = make(name, moe_blocks="none")
    patch = model.backbone.patch_size
    trunk = model.backbone.trunk
    for grid in (NATIVE, OTHER):
        # At its own size, timm takes another path: one position table, cached rotary embedding.
        arguments = {**model.config.trunk_args, "num_classes": 0, "dynamic_img_size": grid != NATIVE}
        theirs: Any = timm.create_model(name, img_size=size(NATIVE, patch), **arguments).eval()
        theirs.norm = nn.Identity()
        theirs.load_state_dict(trunk.state_dict(), strict=False)
        images = torch.randn(2, 3, *size(grid, patch))
        with torch.no_grad():
            expected = theirs.forward_features(images)[:, trunk.num_prefix_tokens :]
            features, routings = model.backbone(images, (0, 1))
        tokens = features.last
        assert routings == [] and tokens.shape == (2, 2, grid[0] * grid[1], 48)
        for task_tokens in tokens:
            # 1e-5 of the largest value: float32, and a position table added in another order.
            assert (task_tokens - expected).abs().max() < 1e-5 * expected.abs().max()


@pytest.mark.parametrize("name", TRUNKS)
def test_experts_in_any_trunk(name: str) -> None:
    model = make(name)
    images = torch.randn(2, 3, *size(OTHER, model.backbone.patch_size))
    together = model(images).logits
    for task in model.config.tasks:
        alone = model(images, [task]).logits[task]
        assert alone.shape[-2:] == images.shape[-2:]
        torch.testing.assert_close(alone, together[task], rtol=1e-4, atol=1e-4)  # float32 sum order
    model.train()
    sum(value.square().mean() for value in model(images).logits.values()).backward()  # type: ignore[union-attr]
    # Nothing of timm's classifier is left: training on several processes would wait for its gradients.
    assert [name for name, parameter in model.named_parameters() if parameter.grad is None] == []


def test_post_norm_blocks() -> None:
    from timm.models.vision_transformer import ResPostBlock

    model = make("vit_tiny_patch16_224", args={"block_fn": ResPostBlock, "init_values": 0.5}, moe_blocks=[1])
    trunk = model.backbone.trunk
    images = torch.randn(1, 3, 48, 64)
    with torch.no_grad():
        (first, second), x = trunk.blocks, trunk.norm_pre(trunk._pos_embed(trunk.patch_embed(images)))
        x = first(x)
        x = x + second.norm1(second.attn(x))
        expected = x + second.norm2(second.mlp(x[None], (1,))[0][0])
        torch.testing.assert_close(model.backbone(images, (1,))[0].last[0], expected[:, 1:])


@pytest.mark.slow
@pytest.mark.parametrize("name", ["vit_tiny_patch16_224", "vit_giant_patch14_dinov2"])  # others: test_families.py
def test_export_with_positions_of_any_grid(name: str) -> None:
    assert_exported_at_any_grid(make(name, tasks=["depth"]))


# --- weights from files ---------------------------------------------------------------------------------------------


def timm_model(name: str, grid: tuple[int, int] = (4, 4), **arguments: Any) -> Any:
    torch.manual_seed(1)
    patch = TRUNKS[name][1]
    model = timm.create_model(name, img_size=size(grid, patch), num_classes=7, **SMALL, **arguments)
    shake(model)
    return model


@pytest.mark.parametrize(
    "name", ["vit_small_patch14_reg4_dinov2", "vit_small_patch16_dinov3", "deit3_small_patch16_224"]
)
def test_weights_of_a_local_file(name: str, tmp_path: Path) -> None:
    theirs = timm_model(name)  # made for 4x4 patches, with a classifier
    for file in ("w.safetensors", "w.pth"):
        if file.endswith("pth"):
            torch.save({"model": theirs.state_dict(), "epoch": 3}, tmp_path / file)
        else:
            save_file(theirs.state_dict(), tmp_path / file)
        torch.manual_seed(0)
        config = ModelConfig(
            trunk=name,
            trunk_args=SMALL,
            image_size=size(NATIVE, theirs.patch_embed.patch_size[0]),
            weights=str(tmp_path / file),
            head_stride=theirs.patch_embed.patch_size[0],
        )
        trunk: Any = new_model(config).backbone.trunk
        torch.testing.assert_close(trunk.blocks[0].state_dict(), theirs.blocks[0].state_dict(), rtol=0, atol=0)
        if trunk.pos_embed is not None:  # resampled as timm itself does
            theirs.set_input_size(size(NATIVE, theirs.patch_embed.patch_size[0]))
            torch.testing.assert_close(trunk.pos_embed, theirs.pos_embed)
            theirs = timm_model(name)


def test_weights_of_a_run_folder(tmp_path: Path) -> None:
    name = "vit_tiny_patch16_224"
    dense = make(name, moe_blocks="none", image_size=size((2, 6), 16))
    assert {key for key in dense.state_dict() if key.startswith(RUN_PREFIX)}
    file = tmp_path / "model.safetensors"
    save_file(dense.state_dict(), file)
    with pytest.raises(InputError, match=r"12 positions are no 3x3 grid; keep model\.json"):
        make(name, weights=str(file))
    (tmp_path / "model.json").write_text(json.dumps({"architecture": {"image_size": [32, 96]}}))
    torch.manual_seed(0)
    config = ModelConfig(trunk=name, trunk_args=SMALL, image_size=size(NATIVE, 16), weights=str(file))
    trunk: Any = new_model(config).backbone.trunk
    theirs: Any = dense.backbone.trunk
    assert torch.equal(trunk.blocks[0].mlp.fc1.weight, theirs.blocks[0].mlp.fc1.weight)
    theirs.set_input_size(size(NATIVE, 16))
    torch.testing.assert_close(trunk.pos_embed, theirs.pos_embed)


def test_weights_that_do_not_fit(tmp_path: Path) -> None:
    name = "vit_tiny_patch16_224"
    state = timm_model(name).state_dict()

    def refused(message: str, file: str = "w.safetensors", **changes: Any) -> None:
        with pytest.raises(InputError, match=message) as caught:
            make(name, weights=str(tmp_path / file), **changes)
        assert "\n" not in str(caught.value)

    refused("give an existing file .safetensors, .pth", file="absent.pth")
    (tmp_path / "w.npz").write_bytes(b"")
    refused("give an existing file", file="w.npz")
    (tmp_path / "w.pth").write_bytes(b"no zip archive")
    refused("cannot be read", file="w.pth")
    torch.save({"model": Path("/")}, tmp_path / "code.pth")  # what would run code is not loaded
    refused("cannot be read", file="code.pth")
    torch.save([1, 2], tmp_path / "list.pth")
    refused("cannot be read|does not fit", file="list.pth")
    save_file(state, tmp_path / "w.safetensors")
    make(name, weights=str(tmp_path / "w.safetensors"))
    refused(
        r"does not fit the trunk vit_tiny_patch16_224: no weights for block 2 of 3, 12 of 40 tensors missing "
        r"\(blocks.2.norm1.weight, .*, ...\); give the weights of this very trunk",
        args={"depth": 3},
    )
    refused(r"weights of block 1, which the trunk does not have, 12 unexpected \(blocks.1.*, ...\)", args={"depth": 1})
    refused(
        r"28 of 28 tensors of another shape \(cls_token is \(1, 1, 48\), expected \(1, 1, 32\)", args={"embed_dim": 32}
    )
    refused(r"1 of 29 tensors missing \(reg_token\)", args={"reg_tokens": 1})
    first = {key: value for key, value in state.items() if not key.startswith("blocks.0.mlp.fc1")}
    save_file(first, tmp_path / "part.safetensors")
    refused(r": 2 of 28 tensors missing \(blocks.0.mlp.fc1.weight, blocks.0.mlp.fc1.bias\)", file="part.safetensors")
    refused("exclude each other", pretrained=True)


def test_pretrained_without_network_or_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*args: object, **kwargs: object) -> None:
        raise ConnectionError("no route to host")

    monkeypatch.setattr("timm.models._builder.load_pretrained", fail)
    with pytest.raises(InputError, match=r"weights of vit_tiny_patch16_224 .*no route to host.*--model.weights"):
        make("vit_tiny_patch16_224", pretrained=True)


# --- timm's own weights, from a file instead of the hub -------------------------------------------------------------


def pretrained(name: str, file: Path, grid: tuple[int, int] = NATIVE, **arguments: Any) -> Any:
    """Return the trunk that model.pretrained gives where timm's weights of `name` are those of a file."""
    overlay = {"file": str(file), "custom_load": False, "num_classes": 7}
    arguments = SMALL | arguments | {"pretrained_cfg_overlay": overlay}
    patch = arguments.get("patch_size", TRUNKS[name][1])
    config = ModelConfig(
        trunk=name, trunk_args=arguments, image_size=size(grid, patch), head_stride=patch, pretrained=True
    )
    return new_model(config).backbone.trunk


PRETRAINED = ("vit_tiny_patch16_224", "deit_tiny_distilled_patch16_224", "vit_small_patch14_reg4_dinov2")
PRETRAINED_EVA = ("vit_small_patch16_dinov3", "eva02_tiny_patch14_224")


@pytest.mark.parametrize("name", [*PRETRAINED, *PRETRAINED_EVA])
def test_pretrained_weights_are_adapted_as_timm_does(name: str, tmp_path: Path) -> None:
    """Another image size and another patch size: resampled; the classifier is left out."""
    theirs = timm_model(name)
    save_file(theirs.state_dict(), tmp_path / "w.safetensors")
    trunk = pretrained(name, tmp_path / "w.safetensors")
    torch.testing.assert_close(trunk.blocks[0].state_dict(), theirs.blocks[0].state_dict(), rtol=0, atol=0)
    assert not trunk._load_state_dict_pre_hooks, "later loads are not checked"
    coarser = pretrained(name, tmp_path / "w.safetensors", patch_size=32)
    torch.testing.assert_close(coarser.blocks[0].state_dict(), theirs.blocks[0].state_dict(), rtol=0, atol=0)
    assert coarser.patch_embed.proj.weight.shape[-1] == 32


@pytest.mark.parametrize("name", [*PRETRAINED, *PRETRAINED_EVA])
def test_pretrained_weights_are_never_loaded_in_part(name: str, tmp_path: Path) -> None:
    theirs = timm_model(name)
    save_file(theirs.state_dict(), tmp_path / "w.safetensors")
    for arguments, message in (
        ({"depth": 5}, r"no weights for blocks 2 to 4 of 5, \d+ of \d+ tensors missing \(blocks.2"),
        ({"depth": 1}, "weights of block 1, which the trunk does not have"),
        ({"embed_dim": 64}, r"tensors of another shape \(.* expected"),
        ({"mlp_ratio": 2}, r"tensors of another shape \(blocks.0.mlp"),
    ):
        with pytest.raises(
            InputError, match=f"model.pretrained: the weights of {name} do not fit .*{message}"
        ) as caught:
            pretrained(name, tmp_path / "w.safetensors", **arguments)
        assert "\n" not in str(caught.value) and "--model.pretrained=false" in str(caught.value)


@pytest.mark.parametrize(
    "name",
    ["resnet50", "swin_tiny_patch4_window7_224", "convnext_tiny", "beit_base_patch16_224", "vit_small_r26_s32_224"],
)
def test_trunks_that_are_no_plain_vit(name: str) -> None:
    with pytest.raises(InputError, match=f"{name} .* is .*, not a plain vision transformer.*vit_small_patch16_dinov3"):
        MultiTaskModel(ModelConfig(trunk=name, image_size=(64, 64)))


def test_parallel_blocks_take_no_experts() -> None:
    for name in ("vit_base_patch16_xp_224", "vit_small_patch16_18x2_224"):
        with pytest.raises(InputError, match=f"block 1 of {name}, a Parallel.*no part of its own"):
            make(name)
        make(name, moe_blocks="none")
