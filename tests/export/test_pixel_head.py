"""Heads with a convolution through both HLS schedules, and the layouts of their pixels."""

import ctypes
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from m3vit.errors import InputError
from m3vit.export.hls import leaf
from m3vit.export.hls.project import export_project
from m3vit.export.hls.spatial.schedule import lower
from m3vit.export.hls.verify import logits_of, verify_project
from m3vit.hw.isa import Conv, Op
from m3vit.hw.manifest import WEIGHTS, read_manifest
from m3vit.hw.program import Image
from m3vit.hw.sim import csim
from m3vit.hw.sim.emulator import Emulator
from m3vit.kinds.decoding import assemble
from m3vit.models.decoders.conv import assemble_pixels, divide_pixels, rectify
from tests.export.models import make_images, make_model, make_samples
from tests.export.multiplexed.test_driver import ModelledDevice, emitted_driver, modelled_allocate

HEAD = {"head": "conv", "head_args": {"width": 6}}
FUSED = {"head": "conv", "head_args": {"width": 6, "unrectified": 2, "blocks": 2}}


def test_pixels_by_hand() -> None:
    """Two tokens side by side, of 2 x 2 pixels with one feature."""
    tokens = torch.arange(8.0).reshape(1, 2, 4)
    pixels = assemble_pixels(tokens, (1, 2), 2)
    assert pixels.tolist() == [[[[0, 1, 4, 5], [2, 3, 6, 7]]]]
    torch.testing.assert_close(divide_pixels(pixels, 2), tokens)


def test_first_features_pass_by_the_relu() -> None:
    pixels = torch.tensor([-1.0, -2.0, 3.0, -4.0]).reshape(1, 4, 1, 1)
    found = {count: rectify(pixels, count).flatten().tolist() for count in (0, 1, 2, 4)}
    assert found == {0: [0, 0, 3, 0], 1: [-1, 0, 3, 0], 2: [-1, -2, 3, 0], 4: [-1, -2, 3, -4]}


def test_pixels_there_and_back() -> None:
    outputs = torch.randn(2, 3 * 4, 5 * 9)
    torch.testing.assert_close(divide_pixels(assemble_pixels(outputs, (3, 4), 3), 3), outputs)
    manifest = {"grid": [3, 4], "image_size": [24, 32], "upscale": 3, "pixels_first": True}
    expected = logits_of(outputs.numpy(), manifest)[1].numpy()
    found = assemble(outputs[1].numpy(), (3, 4), 3, (24, 32), pixels_first=True)
    np.testing.assert_allclose(found, expected, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize(("schedule", "head"), [("spatial", FUSED), ("multiplexed", HEAD), ("multiplexed", FUSED)])
def test_simulation_agrees_with_torch(
    schedule: str, head: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, project = make_model(**head), tmp_path / "project"
    data = {"calibration": make_images(4, seed=9), "samples": make_samples()}
    manifest = export_project(model, project, schedule=schedule, **data)
    assert manifest["pixels_first"] and [task["outputs"] for task in manifest["tasks"]] == [4, 160, 4]
    report = verify_project(project, 1)  # of the multiplexed schedule, with every word compared with the emulator's
    for result in report["tasks"].values():
        assert result["mean_error_relative"] < 1e-3 and result["flips"] == 0
    if schedule == "multiplexed":
        *trunk, before = [i.op for i in Image.read(project / WEIGHTS).program[:-7]]
        assert [i.op for i in Image.read(project / WEIGHTS).program[-7:]] == [Op.NORM, *3 * [Op.LINEAR, Op.CONV]]
        assert before == (Op.LINEAR if head is FUSED else Op.EXPERTS) and trunk.count(Op.NORM) == 4 + (head is FUSED)
        if head is HEAD:
            check_readers(project, monkeypatch)


def check_readers(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The bridge to predict() and the host driver return outputs without what fills up rows of 1 and 40."""
    image, image_file = make_images(1, seed=6)[0], Image.read(project / WEIGHTS)
    convs = [i for i in image_file.program if isinstance(i, Conv)]
    fracs, emulator = read_manifest(project)["output_fracs"], Emulator(image_file)
    library = project / "bridge.so"
    sources = ["m3vit_bridge.cpp", "firmware/m3vit.cpp"]
    flags = ["-O1", "-std=c++11", "-w", "-shared", "-fPIC", "-I.", '-DWEIGHTS_DIR="firmware/weights"']
    subprocess.run([csim.find_compiler(), *flags, *sources, "-o", library.name], cwd=project, check=True)
    predict = ctypes.CDLL(str(library)).m3vit_float
    tokens = np.ascontiguousarray(csim.tokenise(image[None], 8)[0])
    monkeypatch.chdir(project)
    with emitted_driver(project) as driver:
        accelerator = driver.Accelerator(ModelledDevice(project), modelled_allocate, project)
        for task, conv in enumerate(convs):
            words = emulator.run(image, task).outputs
            places = [
                [token * conv.dst_pitch + pixel * conv.pixel_pitch + o for pixel in range(4) for o in range(conv.n_out)]
                for token in range(12)
            ]
            expected = (words[places] * 2.0 ** -fracs[task]).astype(np.float32)
            assert conv.pixel_pitch == (40 if conv.n_out == 40 else 4) and expected.any()
            accelerator.set_task(task)
            np.testing.assert_array_equal(accelerator.run(image), expected)
            outputs, number = np.full((12, 160), 9, np.float32), np.array([task], np.float32)
            predict(*(ctypes.c_void_p(array.ctypes.data) for array in (tokens, number, outputs)))
            np.testing.assert_array_equal(outputs[:, : expected.shape[1]], expected)
            assert not outputs[:, expected.shape[1] :].any()


def test_one_task_less_to_tell() -> None:
    """Of 7 layers that hls4ml can send the task id to, heads with a convolution take two."""
    experts = {"trunk_args": {"depth": 6}, "moe_blocks": list(range(6))}
    with pytest.raises(
        InputError, match="6 MoE layers, and hls4ml can send the task id to 5 of them and the heads and"
    ):
        lower(make_model(**experts, **HEAD))
    assert leaf.token_heads(make_model(**experts))["depth"].conv is None


def test_pixels_are_what_the_head_of_the_model_sees() -> None:
    model = make_model(**HEAD)
    lowered = leaf.lower(model)  # which compares outputs
    weight = lowered.pixel_head.weight
    conv = model.heads["semseg"].output
    assert isinstance(conv, nn.Conv2d) and weight.shape == (1 + 40 + 1, 3, 3, 6)
    torch.testing.assert_close(weight[1:41].permute(0, 3, 1, 2), conv.weight)
