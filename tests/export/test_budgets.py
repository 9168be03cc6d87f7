"""Packages whose graphs keep to a budget by task and by layer: what they compute, and what their manifest says."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from m3vit.errors import InputError
from m3vit.export.onnx.package import Content, budget_of, export_package
from m3vit.export.onnx.parity import check_parity
from m3vit.export.runtime.package import Package
from m3vit.models.budget import Budget
from m3vit.models.config import ModelConfig
from m3vit.models.multitask import MultiTaskModel
from m3vit.profiling import graph_macs

BUDGET = Budget({"depth": {1: 1, 3: 3}}, {"depth": {1: (2,)}, "normals": {3: (0, 1, 3)}})


@pytest.fixture(scope="module")
def model() -> MultiTaskModel:
    torch.manual_seed(0)
    trunk = dict(patch_size=8, embed_dim=32, depth=4, num_heads=2, mlp_ratio=2, global_pool="", class_token=False)
    tasks = ["depth", "normals"]
    config = ModelConfig("vit_tiny_patch16_224", trunk, image_size=(32, 48), tasks=tasks, num_experts=4, top_k=2)
    return MultiTaskModel(config).eval()


def test_budgets_by_layer_are_exported_and_match_torch(model: MultiTaskModel, tmp_path: Path) -> None:
    folder = tmp_path / "package"
    manifest = export_package(model, folder, Content(size=(32, 48), budget=BUDGET), info={})
    images = np.random.default_rng(0).standard_normal((4, 3, 32, 48)).astype(np.float32)
    report = check_parity(model, folder, list(images))
    assert report["depth"]["comparisons"] > 0
    package = Package.load(folder)
    with torch.no_grad():
        expected = model(torch.from_numpy(images), budget=BUDGET).logits
        trained = model(torch.from_numpy(images)).logits
    pixels = torch.from_numpy(images).numpy()
    for task in ("depth", "normals"):
        found = package.logits(pixels, task)
        scale = float(expected[task].abs().max())
        np.testing.assert_allclose(found, expected[task].numpy(), rtol=0, atol=1e-5 * scale)
        assert np.abs(found - trained[task].numpy()).max() > 1e-3 * scale
    experts = {task: manifest["tasks"][task]["experts"] for task in ("depth", "normals")}
    assert experts["depth"]["top_k"] == {"1": 1, "3": 3} and experts["depth"]["kept"] == {"1": [2]}
    assert experts["normals"]["top_k"] == 2 and experts["normals"]["kept"] == {"3": [0, 1, 3]}
    read = budget_of(json.loads((folder / "manifest.json").read_text()))
    assert read == Budget(BUDGET.top_k | {"normals": {1: 2, 3: 2}}, BUDGET.kept)
    # One expert fewer in block 1, one more in block 3: as many multiply-accumulates as trained. Normals has two more
    # channels, of so many pixels a token.
    used = 24 * (2 * 32 * 32 + 32)
    depth, normals = (manifest["tasks"][task]["macs"] for task in ("depth", "normals"))
    head = 24 * 32 * 2 * (8 // model.config.head_stride) ** 2
    assert normals - depth == head
    assert depth - graph_macs(model.config, "depth", (32, 48), Budget({"depth": {3: 1}})) == used


def test_a_budget_of_another_model_writes_nothing(model: MultiTaskModel, tmp_path: Path) -> None:
    for budget, message in ((Budget({"edge": {1: 1}}), "names task edge"), (Budget({"depth": {2: 1}}), "block 2")):
        with pytest.raises(InputError, match=message):
            export_package(model, tmp_path / "package", Content(budget=budget), info={})
    with pytest.raises(InputError, match="top_k is 5 with 4 experts kept"):
        export_package(model, tmp_path / "package", Content(("depth",), budget=Budget({"depth": {1: 5}})), info={})
    assert not (tmp_path / "package").exists()
