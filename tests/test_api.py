"""The Python API: every example of docs/api.md, and that importing it imports nothing."""

import ast
import doctest
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import m3vit
from m3vit.errors import InputError
from m3vit.models.config import ModelConfig
from m3vit.models.initialise import new_model
from tests.command_line import kept_state

DOCS = Path(__file__).resolve().parents[1] / "docs"


@pytest.mark.slow
@pytest.mark.parametrize("page", ["api.md"])
def test_every_example_runs(page: str, tiny_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "data").symlink_to(tiny_data)
    monkeypatch.chdir(tmp_path)
    with kept_state():
        monkeypatch.chdir(tmp_path)
        text = (DOCS / page).read_text().replace("```", "")  # a fence is no line of an example's output
        examples = doctest.DocTestParser().get_doctest(text, {}, page, str(DOCS / page), 0)
        runner = doctest.DocTestRunner(optionflags=doctest.ELLIPSIS)
        report: list[str] = []
        runner.run(examples, out=report.append)
    assert not runner.failures and runner.tries > 20, "".join(report)


def test_importing_it_is_light() -> None:
    code = "import sys, m3vit; print(sorted({name.partition('.')[0] for name in sys.modules}), dir(m3vit))"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "'train'" in result.stdout and "'m3vit'" in result.stdout
    assert not any(f"'{name}'" in result.stdout for name in ("torch", "numpy", "timm", "yaml", "onnxruntime"))


def test_names_are_there_and_for_type_checkers_too() -> None:
    tree = ast.parse(Path(m3vit.__file__).read_text())
    imported = {alias.name for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) for alias in node.names}
    assert set(m3vit.__all__) <= imported and m3vit.InputError is InputError
    for name in m3vit.__all__:
        assert getattr(m3vit, name).__doc__, name
    with pytest.raises(AttributeError, match="no attribute 'trian'"):
        _ = m3vit.trian
    assert (Path(m3vit.__file__).parent / "py.typed").exists()


def test_features_are_the_backbones() -> None:
    torch.manual_seed(0)
    args = {"patch_size": 8, "embed_dim": 32, "depth": 4, "num_heads": 2, "mlp_ratio": 2}
    config = ModelConfig("vit_tiny_patch16_224", args, image_size=(32, 48), num_experts=4, top_k=2)
    model = new_model(config).eval()
    pixels = np.random.default_rng(0).integers(0, 255, (2, 32, 48, 3), np.uint8)
    found = m3vit.forward_intermediates(model, pixels, [-1, 0, 1], ["depth", "edge"])
    mean, std = (torch.tensor(value) for value in model.normalisation)
    images = ((torch.from_numpy(pixels) / 255 - mean) / std).permute(0, 3, 1, 2)
    for place, task in enumerate(("depth", "edge")):
        features, _ = model.backbone(images, (1, 3), (0, 1, 3))
        last, first, routed = found[task]
        torch.testing.assert_close(last, features.of(3)[place].mT.reshape(2, 32, 4, 6))
        torch.testing.assert_close(routed, features.of(1)[place].mT.reshape(2, 32, 4, 6))
        assert torch.equal(first, found["depth"][1]) and last.requires_grad  # before the first router they are the same
    everything = m3vit.forward_intermediates(model, images)
    assert list(everything) == config.tasks and len(everything["depth"]) == 4
    for indices in ([4], [], 9, [-5], True):
        with pytest.raises(InputError, match="give block numbers of 0 to 3"):
            m3vit.forward_intermediates(model, images, indices)  # type: ignore[arg-type]
    with pytest.raises(InputError, match=r"images are float64 \[2, 32, 48, 3\]: give uint8"):
        m3vit.forward_intermediates(model, pixels / 255)


def test_wrong_options_name_the_right_ones(tmp_path: Path) -> None:
    for call, words in (
        (lambda: m3vit.configure("synthetic-tiny", {"epochs": 1}), "a key is 'epochs': choose from .*train.epochs"),
        (lambda: m3vit.configure("synthetic-tiny", {"model.init": "x"}), "model.init is 'x': choose from"),
        (lambda: m3vit.configure("tiny"), "unknown recipe 'tiny'"),
        (
            lambda: m3vit.export_onnx("run", "out", precision="int8"),
            "option of export_onnx is 'precision': .*precisions",
        ),
        (lambda: m3vit.export_hls("run", "out", act_bits="8"), "export_hls.act_bits is '8', expected"),
        (
            lambda: m3vit.routing_statistics("run", images=3),
            "routing_statistics is 'images': choose from split",
        ),
        (lambda: m3vit.load_run(tmp_path), "not a run folder|not found"),
        (lambda: m3vit.evaluate(tmp_path), "is not a run folder, an ONNX package or an HLS project"),
    ):
        with pytest.raises(InputError, match=words):
            call()
