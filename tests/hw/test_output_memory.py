"""Outputs are taken out of the output memory by themselves, whatever fills up its rows."""

from dataclasses import replace
from typing import Any

import numpy as np

from m3vit.hw.isa import WORDS, Conv
from m3vit.hw.output_memory import OutputLayout
from m3vit.hw.sim.emulator import Emulator
from tests.hw.programs import Shape, frames_of, random_vit


def test_outputs_by_hand() -> None:
    """Three tokens of two pixels; a task with three outputs of four places, one with five of eight."""
    layout = OutputLayout(16, 2, [3, 5], [4, 8])
    words = np.arange(2 * 3 * 16).reshape(2, 3, 16)
    for task, (count, pitch) in enumerate(((3, 4), (5, 8))):
        found = layout.outputs(words, task)
        for image in range(2):
            for token in range(3):
                places = [pixel * pitch + o for pixel in range(2) for o in range(count)]
                assert found[image, token].tolist() == [words[image, token, place] for place in places]
    assert OutputLayout.of({"output_layout": layout._asdict()}) == layout


def test_older_projects_have_outputs_side_by_side() -> None:
    """The program of one says no pixel_pitch, and its manifest no layout."""
    shape = Shape(upscale=2, tasks=2)
    image, _ = random_vit(shape)
    (frame,) = frames_of(shape, 1)
    tokens, counts = shape.grid[0] * shape.grid[1], [3, 7]  # of each pixel, by task
    layout = OutputLayout(4 * 8, 4, counts, [4, 8])
    older = replace(image, params=image.params.copy(), memory=image.memory._replace(output=tokens * 4 * 7))
    for pc, instruction in enumerate(image.program):
        if isinstance(instruction, Conv):
            assert (instruction.dst_pitch, instruction.pixel_pitch) == (32, 4 * (instruction.task + 1))
            packed = replace(instruction, pixel_pitch=0, dst_pitch=4 * 7)
            older.params[pc * WORDS : (pc + 1) * WORDS] = packed.encode()
    manifest: dict[str, Any] = {"outputs": 28, "tasks": [{"outputs": 4 * count} for count in counts]}
    for task in range(2):
        now, before = (Emulator(one).run(frame, task).outputs.reshape(tokens, -1) for one in (image, older))
        found = layout.outputs(now, task)
        assert now.shape == (tokens, layout.token_pitch) and found.any()
        np.testing.assert_array_equal(OutputLayout.of(manifest).outputs(before, task), found)
