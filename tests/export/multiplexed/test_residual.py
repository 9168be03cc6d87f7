"""A residual stream of 16 bits: the emulator's words in C++, near what 32 give; refused where it cannot be."""

import subprocess
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from m3vit.errors import InputError
from m3vit.export.hls.multiplexed import schedule
from m3vit.export.hls.verify import verify_project
from m3vit.hw.hardware import Hardware
from m3vit.hw.isa import Linear
from m3vit.hw.program import Image
from m3vit.hw.sim import csim, rtl
from m3vit.hw.weights_file import Header
from tests.export.models import make_images, make_model
from tests.export.multiplexed.exporting import export
from tests.test_cli import refused

pytestmark = pytest.mark.slow

WEIGHTS = Path("firmware/weights/weights.bin")
EIGHT = {"weight_bits": 8, "act_bits": 8}


def test_sixteen_bits_hold_what_thirty_two_do(tmp_path: Path) -> None:
    model, images, outputs = make_model(), make_images(3, seed=7), {}
    with torch.no_grad():  # the stream grows, as pretrained ones do
        model.backbone.trunk.blocks[1].attn.proj.weight.mul_(64)  # type: ignore[union-attr, operator]
    for bits in (32, 16):
        project = tmp_path / str(bits)
        manifest = export(model, project, residual_bits=bits, **EIGHT)
        assert manifest["hardware"]["wide_bits"] == manifest["precision"]["wide_bits"] == bits
        outputs[bits] = schedule.runner(project, manifest).run(images)
    verify_project(tmp_path / "16")  # raises where words differ
    streams = sorted(kinds["stream"] for kinds in manifest["precision"]["layers"].values() if "stream" in kinds)
    assert streams[0] < streams[-1] <= manifest["precision"]["wide_frac"]
    lost = [i.rescale for i in Image.read(tmp_path / "16" / WEIGHTS).program if isinstance(i, Linear)]
    assert sum(lost) == manifest["precision"]["wide_frac"] - streams[0]
    assert Image.read(tmp_path / "16" / WEIGHTS).wide_bits == 16
    found = Header.read(tmp_path / "32" / WEIGHTS)
    assert found and found.wide_bits == 0, "the file is what it was"
    text = (tmp_path / "16" / "README.md").read_text()
    assert "one of int16. Scratch" in text
    # Of outputs of size 1 the rounding of the stream is a part of what 8-bit activations lose.
    assert np.abs(outputs[16] - outputs[32]).mean() < 0.02 * np.abs(outputs[32]).mean()
    with pytest.raises(InputError, match="a residual stream of 16 bits: the RTL has 32"):
        rtl.write_sources(tmp_path / "rtl", Hardware(**{**manifest["hardware"], "folded": False}))
    # A file for the other width is not taken.
    data = tmp_path / "16" / "tb_data"
    files = [tmp_path / "32" / WEIGHTS, data / "images.bin", data / "tasks.bin"]
    written = [tmp_path / name for name in ("outputs.bin", "counters.json", "routing.bin")]
    done = subprocess.run([tmp_path / "16" / csim.TESTBENCH, *files, *written], capture_output=True, text=True)
    assert done.returncode == 2 and "a residual stream of 32 bits, not this accelerator's" in done.stderr


def test_where_it_cannot_be(cli: Callable[..., subprocess.CompletedProcess], tiny_run: Path, tmp_path: Path) -> None:
    words = ("export", "hls", tiny_run, "--out", tmp_path / "out", "--residual-bits", 16)
    refused(cli(*words), "--residual-bits: the spatial schedule has no engines to fit")
    refused(cli(*words, "--schedule", "multiplexed"), "a residual stream of 16 bits goes with 8-bit activations")
    refused(cli(*words[:-1], 24, "--schedule", "multiplexed"), "--residual-bits 24: choose from 16, 32")
    result = cli("hw", "cost", tiny_run, "--residual-bits", 16, "--weight-bits", 8, "--act-bits", 8)
    assert result.returncode == 0, result.stderr
