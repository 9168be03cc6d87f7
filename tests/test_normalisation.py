"""How pixels enter a network: resolved once, kept in the run, and the same in training, ONNX and HLS."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
import yaml
from safetensors.torch import save_file

from m3vit.cli import main
from m3vit.data.opening import open_split
from m3vit.errors import InputError
from m3vit.evaluation.artefacts import open_predictor
from m3vit.evaluation.evaluate import torch_predictor
from m3vit.evaluation.protocols import network_image
from m3vit.export.runtime.package import Package
from m3vit.models.config import ModelConfig
from m3vit.models.initialise import new_model
from m3vit.models.multitask import MultiTaskModel
from m3vit.normalisation import IMAGENET, Normalisation, parse, recorded
from m3vit.run_folder import load_run
from m3vit.training.config import read_config, recipe_names, recipe_path
from tests.conftest import ROOT, TINY

HALF = Normalisation((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
CLIP = Normalisation((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711))
SMALL = {"embed_dim": 48, "depth": 2, "num_heads": 2}


def build(trunk: str, **changes: Any) -> MultiTaskModel:
    patch = 14 if "patch14" in trunk else 16
    arguments = {**SMALL, **changes.pop("args", {})}
    config = ModelConfig(trunk=trunk, trunk_args=arguments, image_size=(4 * patch, 4 * patch), head_stride=patch)
    for key, value in changes.items():
        setattr(config, key, value)
    return new_model(config)


# --- resolving ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("trunk", "expected"),
    [("vit_small_patch16_224", HALF), ("deit_small_patch16_224", IMAGENET), ("eva02_tiny_patch14_224", CLIP)],
)
def test_auto_is_that_of_the_weights(trunk: str, expected: Normalisation, tmp_path: Path) -> None:
    file = tmp_path / "timm.safetensors"
    size = 56 if "patch14" in trunk else 64
    save_file(timm.create_model(trunk, img_size=size, num_classes=0, **SMALL).state_dict(), file)
    assert build(trunk, weights=str(file)).normalisation == expected
    overlay = {"pretrained_cfg_overlay": {"file": str(file), "custom_load": False, "num_classes": 0}}
    model = build(trunk, args=overlay, pretrained=True)
    assert model.normalisation == expected
    assert model.config.normalisation == expected.plain(), "numbers, whatever timm's table says later"
    assert build(trunk).normalisation == IMAGENET, "random weights"
    assert build(trunk, weights=str(file), normalisation="imagenet").normalisation == IMAGENET
    assert build(trunk, weights=str(file), normalisation=CLIP.plain()).normalisation == CLIP


def test_auto_with_weights_of_a_run_is_that_of_the_run(tmp_path: Path) -> None:
    name, file = "vit_tiny_patch16_224", tmp_path / "model.safetensors"
    save_file(build(name, moe_blocks="none").state_dict(), file)
    with pytest.raises(InputError, match=r"do not say how .* were normalised: give --model\.normalisation"):
        build(name, weights=str(file))
    assert build(name, weights=str(file), normalisation="imagenet").normalisation == IMAGENET
    for written, expected in (({"normalisation": CLIP.plain()}, CLIP), ({}, IMAGENET)):
        (tmp_path / "model.json").write_text(json.dumps({"architecture": {"image_size": [64, 64]}, **written}))
        assert build(name, weights=str(file)).normalisation == expected


def test_recipes_keep_the_published_normalisation() -> None:
    for name in recipe_names():
        model = yaml.safe_load(recipe_path(name).read_text())["model"]
        assert "weights" not in model and model.get("normalisation", "imagenet") == "imagenet", name
        timm_config = timm.get_pretrained_cfg(model["trunk"])
        if model.get("pretrained") and "normalisation" not in model:
            assert Normalisation(timm_config.mean, timm_config.std) == IMAGENET, name


@pytest.mark.parametrize(
    "value",
    [
        "inception",
        "",
        {},
        {"mean": [0.5, 0.5, 0.5]},
        {"mean": [0.5, 0.5, 0.5], "std": [0.5, 0.5]},
        {"mean": [123.7, 116.3, 103.5], "std": [58.4, 57.1, 57.4]},  # of images in 0 to 255
        {"mean": [0.5, 0.5, 0.5], "std": [0.5, 0.0, 0.5]},
        {"mean": [0.5, 0.5, float("nan")], "std": [0.5, 0.5, 0.5]},
        {"mean": ["a", "b", "c"], "std": [0.5, 0.5, 0.5]},
        {"mean": [True, True, True], "std": [0.5, 0.5, 0.5]},
        {"mean": 0.5, "std": 0.5},
        {"mean": [0.5, 0.5, 0.5], "std": [0.5, 0.5, 0.5], "more": []},
        None,
        0.5,
    ],
    ids=str,
)
def test_values_that_are_refused(value: Any) -> None:
    with pytest.raises(InputError, match=r"model.normalisation is .*: give auto, imagenet or both of mean and std"):
        ModelConfig(normalisation=value).check()


def test_what_files_hold() -> None:
    assert recorded(None, "x") == IMAGENET
    for one in (HALF, CLIP, IMAGENET):
        assert recorded(json.loads(json.dumps(one.plain())), "x") == one
    assert parse({"mean": [0, 0, 0], "std": [1, 1, 1]}, "x").pixel == (0, 0, 0)
    assert HALF.pixel == (128, 128, 128) and IMAGENET.pixel == (124, 116, 104)
    with pytest.raises(InputError, match=r"normalisation of run/model\.json is 'auto'"):
        recorded("auto", "normalisation of run/model.json")


def test_nothing_else_knows_the_constants() -> None:
    own = ROOT / "m3vit" / "normalisation.py"
    for folder in ("m3vit", "export", "hw", "data"):
        for path in (ROOT / folder).rglob("*.py"):
            if path != own:
                text = path.read_text()
                assert "IMAGENET" not in text and "0.485, 0.456" not in text, path


# --- the whole path -------------------------------------------------------------------------------------------------


def command(*words: object) -> None:
    assert main([str(word) for word in words]) == 0, words


KEYS = ["synthetic-tiny", *TINY, "--model.tasks=[depth]", "--model.image_size=[40,56]"]  # images of 32x48 are padded
GIVEN = Normalisation((0.5, 0.4, 0.3), (0.5, 0.25, 0.3))


@pytest.mark.slow
def test_torch_onnx_and_hls_agree(tiny_data: Path, tmp_path: Path) -> None:
    given = f"--model.normalisation={json.dumps(GIVEN.plain())}"
    run, onnx, hls = (tmp_path / name for name in ("run", "onnx", "hls"))
    command("init", *KEYS, given, f"--data.root={tiny_data}", "--out", run)
    model = load_run(run).model
    assert model.normalisation == GIVEN
    assert json.loads((run / "model.json").read_text())["normalisation"] == GIVEN.plain()
    command("export", "onnx", run, "--out", onnx)
    command("export", "hls", run, "--schedule", "multiplexed", "--samples", 1, "--out", hls)
    assert json.loads((hls / "m3vit.json").read_text())["normalisation"] == GIVEN.plain()
    assert json.loads((onnx / "manifest.json").read_text())["image"] == {**GIVEN.plain(), "train_size": [40, 56]}

    def logits(model: MultiTaskModel, pixels: np.ndarray) -> np.ndarray:
        x = (torch.from_numpy(pixels) / 255 - torch.tensor(GIVEN.mean)) / torch.tensor(GIVEN.std)
        with torch.inference_mode():
            return model(x.permute(2, 0, 1)[None].float()).logits["depth"][0, 0].numpy()

    sample = open_split("nyud", str(tiny_data), "val", ["depth"]).load(0)
    predictors = [open_predictor(folder, "cpu", 1)[0] for folder in (run, onnx, hls)]
    for protocol in ("A", "B"):
        image = network_image(protocol, sample.id, sample.image, (40, 56))
        by_torch, by_onnx, by_hls = (predictor.run([image])["depth"][0, 0].numpy() for predictor in predictors)
        if protocol == "A":
            np.testing.assert_allclose(by_torch, logits(model, image.pixels), atol=1e-5)
            predicted = Package.load(onnx).predict(image.pixels, "depth")
            np.testing.assert_allclose(predicted, by_torch, atol=1e-5)
        np.testing.assert_allclose(by_onnx, by_torch, atol=1e-5)
        model.normalisation = IMAGENET
        wrong = torch_predictor(model).run([image])["depth"][0, 0].numpy()
        model.normalisation = GIVEN
        # Fixed point, and padding that is the nearest pixel to zero: far from what another normalisation gives.
        assert np.abs(by_hls - by_torch).max() < 0.1 * np.abs(wrong - by_torch).max(), protocol


def test_a_run_keeps_its_numbers(
    tiny_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Resumed with auto after timm's table has changed, and a run from before there was a choice."""
    name = "vit_tiny_patch16_224"
    arguments = {**SMALL, "patch_size": 16}
    file = tmp_path / "timm.safetensors"
    save_file(timm.create_model(name, img_size=(32, 48), num_classes=0, **arguments).state_dict(), file)
    keys = ["synthetic-tiny", f"--model.trunk_args={json.dumps(arguments)}", "--model.image_size=[32,48]"]
    keys += ["--model.tasks=[depth]", "--model.num_experts=4", f"--model.weights={file}", f"--data.root={tiny_data}"]
    keys += ["--train.batch_size=5", "--train.epochs=1", "--train.threads=1", "--train.checkpoint_steps=1"]
    run = tmp_path / "run"
    command("train", *keys, "--out", run)
    assert "images are normalised with mean 0.5 0.5 0.5, std 0.5 0.5 0.5" in capsys.readouterr().out
    assert read_config(run / "config.yaml").model.normalisation == HALF.plain()
    assert read_config(run / "best" / "config.yaml").model.normalisation == HALF.plain()

    monkeypatch.setattr("m3vit.normalisation.IMAGENET", CLIP)
    create = timm.create_model

    def changed(*args: Any, **options: Any) -> Any:
        trunk = create(*args, **options)
        trunk.pretrained_cfg = {**trunk.pretrained_cfg, **CLIP.plain()}
        return trunk

    monkeypatch.setattr(timm, "create_model", changed)
    command("train", *keys, "--out", run, "--resume")
    assert "mean 0.5 0.5 0.5" in capsys.readouterr().out
    assert load_run(run).model.normalisation == HALF
    other = "--model.normalisation=imagenet"
    assert main(["train", *keys, other, "--out", str(run), "--resume"]) == 2
    assert "started with other values of model.normalisation" in capsys.readouterr().err


def test_a_run_from_before_there_was_a_choice(tiny_run: Path, tmp_path: Path) -> None:
    run = shutil.copytree(tiny_run, tmp_path / "run")
    config = yaml.safe_load((run / "config.yaml").read_text())
    assert config["model"].pop("normalisation") == IMAGENET.plain()
    (run / "config.yaml").write_text(yaml.safe_dump(config, sort_keys=False))
    assert read_config(run / "config.yaml").model.normalisation == IMAGENET.plain()
    assert load_run(run).model.normalisation == IMAGENET
