"""Every family of trunks that README names, small: init, profile, a training step, ONNX at any grid, predict."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from m3vit.cli import main
from m3vit.data.network_input import image_tensor, normalise
from m3vit.run_folder import load_run
from tests.models.grids import assert_exported_at_any_grid

pytestmark = pytest.mark.slow

# name: patch size. (AugReg's is the trunk of all other tests.) Together: fused and separate projections, biases apart,
# class, register and distillation tokens, learned and rotary positions, GELU and SwiGLU, LayerScale, norms before and
# within the blocks.
FAMILIES = {
    "deit_tiny_distilled_patch16_224": 16,
    "deit3_small_patch16_224": 16,
    "vit_small_patch14_reg4_dinov2": 14,
    "vit_small_patch16_dinov3": 16,
    "vit_base_patch16_clip_224": 16,
    "eva02_tiny_patch14_224": 14,
    "eva02_base_patch14_224": 14,
    "vit_small_patch16_rope_mixed_224": 16,
}


def command(*words: object) -> None:
    assert main([str(word) for word in words]) == 0, words


@pytest.mark.parametrize("name", FAMILIES)
def test_whole_path(name: str, tiny_data: Path, tmp_path: Path) -> None:
    patch = FAMILIES[name]
    size = (2 * patch, 3 * patch)
    recipe = [
        "synthetic-tiny",
        f"--data.root={tiny_data}",
        f"--model.trunk={name}",
        "--model.trunk_args={embed_dim: 48, depth: 2, num_heads: 2}",
        f"--model.image_size={list(size)}",
        f"--model.head_stride={patch // 2}",
        "--model.tasks=[depth]",
        "--model.num_experts=4",
        "--train.threads=1",
    ]
    command("init", *recipe, "--out", tmp_path / "untrained")
    command("profile", tmp_path / "untrained", "--json", tmp_path / "profile.json")
    parts = json.loads((tmp_path / "profile.json").read_text())["tasks"]["depth"]["macs"]["parts"]
    assert min(parts[part] for part in ("embedding", "attention", "dense_mlps", "routers", "experts", "heads")) > 0
    step = ["--train.batch_size=10", "--train.epochs=1", "--train.warmup_epochs=0"]
    command("train", *recipe, *step, "--out", tmp_path / "run")
    model = load_run(tmp_path / "run").model
    before = load_run(tmp_path / "untrained").model.state_dict()
    assert any(not torch.equal(value, before[key]) for key, value in model.state_dict().items()), "nothing was trained"
    command("export", "onnx", tmp_path / "run", "--out", tmp_path / "onnx")
    image = np.random.default_rng(0).integers(0, 256, (*size, 3), dtype=np.uint8)
    Image.fromarray(image).save(tmp_path / "image.png")
    command("predict", tmp_path / "onnx", tmp_path / "image.png", "--task", "depth", "--raw", "--out", tmp_path / "out")
    with torch.inference_mode():
        expected = model(normalise(image_tensor(image), model.normalisation)[None]).logits["depth"][0, 0].numpy()
    found = np.load(tmp_path / "out" / "image_depth.npy")
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-4)  # float32, in another order
    assert_exported_at_any_grid(model)
