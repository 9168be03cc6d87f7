"""Packages whose graphs keep to a budget by task and by layer: what they compute, and what their manifest says."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from m3vit.digests import read_sealed_json, write_sealed_json
from m3vit.errors import InputError
from m3vit.export.onnx.package import Content, budget_of, export_package
from m3vit.export.onnx.parity import check_parity
from m3vit.export.runtime.package import Package
from m3vit.models.budget import FULL, Budget
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


WIDTH = {0: 24, 1: 8, 2: 40, 3: 16}  # of 64 and, of experts, 32
BUDGETS = {
    "full": FULL,
    "light": Budget({"depth": {1: 1}, "normals": {3: 1}}, width=WIDTH),
    "fast": Budget({"depth": {1: 1, 3: 1}, "normals": {1: 1, 3: 1}}, width={0: 16, 1: 8, 2: 0, 3: 8}),
}


def assert_close(found: NDArray[Any], expected: torch.Tensor) -> None:
    np.testing.assert_allclose(found, expected.numpy(), rtol=0, atol=1e-5 * float(expected.abs().max()))


def images_of(count: int) -> NDArray[np.float32]:
    return np.random.default_rng(0).standard_normal((count, 3, 32, 48)).astype(np.float32)


@pytest.mark.parametrize("static", [False, True])
def test_widths_are_exported_and_match_torch(model: MultiTaskModel, tmp_path: Path, static: bool) -> None:
    folder, budget = tmp_path / "package", BUDGETS["light"]
    precisions = ("fp32", "int8") if not static else ("fp32",)
    content = Content(size=(32, 48), budget=budget, static=static, all_tasks=not static, precisions=precisions)
    manifest = export_package(model, folder, content, info={})
    check_parity(model, folder, list(images_of(2)))
    assert budget_of(manifest).width == WIDTH
    entry = manifest["tasks"]["depth"]
    assert entry["macs"] == graph_macs(model.config, "depth", (32, 48), budget, every_expert=static)
    whole = export_package(model, tmp_path / "whole", Content(size=(32, 48), static=static), info={})
    weights = [one["tasks"]["depth"]["graphs"]["fp32"]["weight_bytes"] for one in (manifest, whole)]
    left_out = 4 * 2 * 32 * ((64 - 24) + (64 - 40) + 4 * (32 - 8) + 4 * (32 - 16))
    assert weights[1] - weights[0] == pytest.approx(left_out, rel=0.05)  # biases may be in the graph or in the file


def test_several_budgets_have_one_file_of_weights(model: MultiTaskModel, tmp_path: Path) -> None:
    content = Content(size=(32, 48), budgets=BUDGETS, all_tasks=True, precisions=("fp32", "fp16"))
    folder, sizes, pixels = tmp_path / "package", {}, images_of(2)
    for count in (2, 3):
        some = dict(list(BUDGETS.items())[:count])
        manifest = export_package(model, folder, replace(content, budgets=some), info={})
        sizes[count] = (folder / "weights.bin").stat().st_size
    assert sizes[3] == sizes[2], "a further budget is graphs alone"
    whole = replace(content, budgets={})
    export_package(model, tmp_path / "whole", whole, info={})
    assert sizes[3] == pytest.approx((tmp_path / "whole" / "weights.bin").stat().st_size, rel=0.02)

    report = check_parity(model, folder, list(pixels))
    assert list(report) == [
        f"{task}{of}" for of in ("", ", budget light", ", budget fast") for task in ("depth", "normals")
    ]
    assert manifest["budget"] == "full" and list(manifest["budgets"]) == ["light", "fast"]
    package = Package.load(folder)
    assert package.budgets == ["full", "light", "fast"]
    macs = [package.of(name).entry("depth")["macs"] for name in package.budgets]
    assert macs == sorted(macs, reverse=True) and len(set(macs)) == 3
    for name, budget in BUDGETS.items():
        with torch.no_grad():
            expected = model(torch.from_numpy(pixels), budget=budget).logits
        for task in ("depth", "normals"):
            assert_close(package.logits(pixels, task, budget=name), expected[task])
            assert_close(package.of(name).logits_all(pixels)[task], expected[task])
        assert Package.load(folder, budget=name).of("full").logits(pixels, "depth").tobytes() == (
            package.logits(pixels, "depth").tobytes()
        )
    image = np.random.default_rng(1).integers(0, 256, (32, 48, 3), np.uint8)
    predicted = {name: package.predict(image, "depth", budget=name) for name in package.budgets}
    assert not np.allclose(predicted["full"], predicted["fast"])
    assert np.array_equal(predicted["fast"], package.predict(image, "all", budget="fast")["depth"]) or np.allclose(
        predicted["fast"], package.predict(image, "all", budget="fast")["depth"], atol=1e-5
    )
    with pytest.raises(InputError, match="has no budget 'slow': choose from full, light, fast"):
        package.predict(image, "depth", budget="slow")
    with pytest.raises(InputError, match="has no budgets to choose from"):
        Package.load(tmp_path / "whole", budget="light")


@pytest.mark.slow
def test_heads_of_fewer_channels_have_one_file_of_weights(model: MultiTaskModel, tmp_path: Path) -> None:
    """BatchNorm is folded into the same bits under every budget, and rows are a beginning of all rows."""
    torch.manual_seed(0)
    pup = MultiTaskModel(replace(model.config, head="pup", num_experts=2, top_k=1, tasks=["normals"])).eval()
    for norm in pup.modules():
        if isinstance(norm, torch.nn.BatchNorm2d):
            torch.nn.init.uniform_(norm.running_var, 0.5, 2)  # type: ignore[arg-type]
            torch.nn.init.normal_(norm.running_mean, std=0.1)
    budgets = {"full": FULL, "fast": Budget(heads={"normals": 64}, width={1: 8})}
    manifest = export_package(pup, tmp_path / "some", Content(size=(32, 48), budgets=budgets), info={})
    alone = export_package(pup, tmp_path / "one", Content(size=(32, 48), budget=budgets["fast"]), info={})
    some, one = (tmp_path / name / "weights.bin" for name in ("some", "one"))
    parameters = 4 * sum(parameter.numel() for parameter in pup.parameters())
    assert some.stat().st_size < 1.02 * parameters, "a further budget is graphs alone, and what heads end with"
    assert one.stat().st_size < parameters / 5, "a package of one budget has no more than it uses"
    package = Package.load(tmp_path / "some")
    for name, budget in budgets.items():
        with torch.no_grad():
            expected = pup(torch.from_numpy(images_of(2)), budget=budget).logits["normals"]
        assert_close(package.logits(images_of(2), "normals", budget=name), expected)
        entry = package.of(name).entry("normals")
        assert entry["head_channels"] == budget.heads.get("normals", 256)
        assert entry["macs"] == graph_macs(pup.config, "normals", (32, 48), budget)
    assert_close(Package.load(tmp_path / "one").logits(images_of(2), "normals"), expected)
    assert budget_of(manifest).heads == {"normals": 256} and budget_of(alone).heads == {"normals": 64}


def test_a_damaged_list_of_budgets_is_refused(model: MultiTaskModel, tmp_path: Path) -> None:
    folder = tmp_path / "package"
    one = Budget({"depth": {1: 1, 3: 1}})
    content = Content(("depth",), size=(32, 48), budgets={"full": FULL, "fast": one}, precisions=("int8", "fp32"))
    export_package(model, folder, content, info={})
    size = (folder / "weights.bin").stat().st_size
    export_package(model, tmp_path / "whole", replace(content, budgets={}), info={})
    assert size == (tmp_path / "whole" / "weights.bin").stat().st_size, "the same weights, in int8 too"
    manifest = read_sealed_json(folder / "manifest.json", "")
    del manifest["budgets"]["fast"]["tasks"]["depth"]["macs"]
    write_sealed_json(folder / "manifest.json", manifest)
    with pytest.raises(InputError, match="is damaged"):
        Package.load(folder)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (Content(budgets=BUDGETS, precisions=("int8",)), "weights in common in fp32 and fp16 alone, not in int8"),
        (Content(budgets=BUDGETS, size=(32, 48), static=True), "leave out --static, or give one budget a package"),
        (Content(budgets=BUDGETS, one_backbone=True), "leave out .* or --one-backbone"),
        (Content(budgets={"int8": FULL, "x": FULL}), "a budget cannot be called 'int8'"),
        (Content(budgets={"a b": FULL, "x": FULL}), "a budget cannot be called 'a b'"),
    ],
)
def test_budgets_that_no_package_has(content: Content, message: str) -> None:
    with pytest.raises(InputError, match=message):
        content.check()


def test_widths_and_channels_that_are_all_make_no_other_budget(model: MultiTaskModel) -> None:
    """A search writes every one: budgets that differ in experts alone go with integers all the same."""
    said = Budget({"depth": {1: 1}}, width={0: 64, 1: 32, 2: 8}, heads={"depth": 256, "normals": 64})
    short = said.shortened(model.hidden_widths(), {"depth": 256, "normals": 256})
    assert short == Budget({"depth": {1: 1}}, width={2: 8}, heads={"normals": 64})
    spelled = Budget({"depth": {1: 1}}, width=model.hidden_widths())
    for budget, nested in ((spelled, True), (spelled.shortened(model.hidden_widths(), {}), False)):
        assert Content(budgets={"full": FULL, "few": budget}).nested == nested


def test_a_budget_of_another_model_writes_nothing(model: MultiTaskModel, tmp_path: Path) -> None:
    for budget, message in ((Budget({"edge": {1: 1}}), "names task edge"), (Budget({"depth": {2: 1}}), "block 2")):
        with pytest.raises(InputError, match=message):
            export_package(model, tmp_path / "package", Content(budget=budget), info={})
    with pytest.raises(InputError, match="top_k is 5 with 4 experts kept"):
        export_package(model, tmp_path / "package", Content(("depth",), budget=Budget({"depth": {1: 5}})), info={})
    assert not (tmp_path / "package").exists()
