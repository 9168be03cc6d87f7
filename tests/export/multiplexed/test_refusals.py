"""What the multiplexed schedule refuses, and that nothing is lost by it."""

import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from m3vit.errors import InputError
from m3vit.evaluation.artefacts import open_predictor
from m3vit.export.hls import leaf
from m3vit.export.hls.multiplexed import schedule
from m3vit.export.hls.project import Samples
from m3vit.export.hls.spatial import schedule as spatial
from m3vit.export.hls.verify import verify_project
from m3vit.hw.boards import BUDGETS, find_board, resources
from m3vit.hw.fit import fit
from m3vit.hw.isa import Instruction
from m3vit.hw.manifest import WEIGHTS
from m3vit.hw.network import Head, Network, program_of
from m3vit.hw.program import Image
from m3vit.hw.sim import csim
from m3vit.hw.sim.emulator import Emulator
from m3vit.models.multitask import MultiTaskModel
from tests.export.models import TASKS, make_images, make_model
from tests.export.multiplexed.exporting import export

pytestmark = pytest.mark.slow


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"weight_bits": 10}, "weight_bits is 10: the multiplexed schedule has 8, 12, 16"),
        ({"act_bits": 20}, "act_bits is 20: the multiplexed schedule has 8, 10, 12, 14, 16"),
        ({"board": "zcu999"}, "choose from kv260, pynq-z2, u280, u50, u55c, ultra96, vck190, zcu102, zcu104"),
    ],
)
def test_bad_options(tmp_path: Path, model: MultiTaskModel, change: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        export(model, tmp_path / "out", **change)
    assert os.listdir(tmp_path) == []


def test_unsupported_models_are_refused_before_anything_is_written(tmp_path: Path) -> None:
    for trunk, config, message in (
        ({"act_layer": "silu"}, {}, "MLP of block 0 is a Mlp with SiLU"),
        ({}, {"head": "pup"}, "the model has pup heads"),
        ({"qk_norm": True}, {}, "not plain softmax attention"),
    ):
        with pytest.raises(InputError, match=message):
            export(make_model(trunk, **config), tmp_path / "out")  # type: ignore[arg-type]
    assert os.listdir(tmp_path) == []


def test_more_moe_layers_than_streams_can_feed(tmp_path: Path) -> None:
    deep = make_model({"depth": 7}, moe_blocks=list(range(7)))
    with pytest.raises(InputError, match="give --schedule multiplexed"):
        spatial.lower(deep)
    manifest = export(deep, tmp_path / "out")
    assert len(manifest["moe_layers"]) == 7
    assert verify_project(tmp_path / "out", 1)["different_words"] == 0


def program(tokens: int = 1024, dim: int = 384, mlp: int = 1536, board: str = "zcu104") -> list[Instruction]:
    """The program of a ViT of one block with experts, 16-bit."""
    sizes = {"grid": (1, tokens), "patch": 16, "prefix": 1, "dim": dim, "heads": 6, "mlps": [mlp], "top_ks": [4]}
    network = Network(**sizes, experts=16, tasks=[Head(21)], upscale=1)
    return program_of(network, 16, 16, find_board(board).port_bits)


def test_what_does_not_fit_is_refused_with_what_would(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(InputError, match=r"does not fit ultra96 \(modelled\).*dsp of 288.*; give --board .*zcu104"):
        fit(program(), 16, 16, find_board("ultra96"))
    with pytest.raises(InputError, match="8193 tokens, and the queues of the multiplexed schedule hold 8192"):
        fit(program(8192), 16, 16, find_board("zcu104"))
    with pytest.raises(InputError, match=r"does not fit zcu104 .*uram of 76.*; no board here holds it"):
        fit(program(mlp=1 << 20), 16, 16, find_board("zcu104"))
    for name in ("zcu104", "zcu102", "u50"):  # ViT-S
        board = find_board(name)
        chosen = fit(program(board=name), 16, 16, board)
        for kind, value in resources(chosen).items():
            assert value <= BUDGETS[kind] * getattr(board, kind)
    called = []
    monkeypatch.setattr(schedule, "write_project", lambda *arguments: called.append(1))
    with pytest.raises(InputError, match="does not fit"):
        export(make_model(), tmp_path / "out", board="pynq-z2")
    assert not called and os.listdir(tmp_path) == []


def test_too_many_tokens_are_refused_before_the_long_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(leaf, "lower", lambda *arguments, **options: 1 / 0)
    large = make_model({"patch_size": 2}, image_size=(192, 192), head_stride=2)
    images = np.zeros((1, 192, 192, 3), np.uint8)
    labels = [{task: np.zeros((192, 192)) for task in TASKS}]
    with pytest.raises(InputError, match="9216 tokens, and the queues of the multiplexed schedule hold 8192"):
        export(large, tmp_path / "out", calibration=images, samples=Samples(["0"], images, labels))
    assert os.listdir(tmp_path) == []


def test_an_interrupted_export_leaves_the_old_project(
    copy: Path, model: MultiTaskModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*arguments: Any) -> None:
        raise KeyboardInterrupt

    before = sorted(path.name for path in copy.rglob("*"))
    monkeypatch.setattr(schedule, "write_bench", interrupted)
    with pytest.raises(KeyboardInterrupt):
        export(model, copy)
    assert sorted(path.name for path in copy.rglob("*")) == before and os.listdir(copy.parent) == ["copy"]


def test_changed_weights_are_noticed(copy: Path) -> None:
    path = copy / WEIGHTS
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    with pytest.raises(InputError, match=r"weights\.bin was changed since export"):
        verify_project(copy)
    with pytest.raises(InputError, match=r"weights\.bin was changed since export"):
        open_predictor(copy, "cpu", 1)
    path.write_bytes(data[: len(data) // 2])
    with pytest.raises(InputError, match="is cut short"):
        Image.read(path)
    path.write_bytes(b"0" * 400)
    with pytest.raises(InputError, match="not a weights file"):
        Image.read(path)


def test_frames_of_another_size_are_refused(report: dict[str, Any], project: Path) -> None:
    with pytest.raises(InputError, match=r"give uint8 \[n, 24, 32, 3\]"):
        csim.run_frames(project, np.zeros((1, 8, 8, 3), np.uint8), np.zeros(1, int))
    with pytest.raises(InputError, match="give 0 to 255"):
        csim.run_frames(project, make_images(1), np.array([300]))
    with pytest.raises(InputError, match="give uint8 with 2304 values"):
        Emulator.open(project / WEIGHTS).run(np.zeros((8, 8, 3), np.uint8), 0)
