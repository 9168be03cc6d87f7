"""The output memory of the accelerator: its rows begin at whole words of the port, and are taken out of it here.

Stands alone: it needs numpy only, and each project's host driver has a copy of it. m3vit_bridge.cpp is the same in C++.
"""

from typing import Any, NamedTuple

import numpy as np

MANIFEST_KEY = "output_layout"


class OutputLayout(NamedTuple):
    """Where the outputs of a token lie, in elements.

    A token has `pixels` rows of `pixel_outputs` of its task, `pixel_pitches` of its task apart (a head without a
    convolution has one), and the next token begins `token_pitch` after it. What lies between is no output.
    """

    token_pitch: int
    pixels: int
    pixel_outputs: list[int]
    pixel_pitches: list[int]

    @classmethod
    def of(cls, manifest: dict[str, Any]) -> "OutputLayout":
        """Return that of a project. One by an older version says none: its outputs lie side by side."""
        if MANIFEST_KEY in manifest:
            return cls(**manifest[MANIFEST_KEY])
        counts = [task["outputs"] for task in manifest["tasks"]]
        return cls(manifest["outputs"], 1, counts, counts)

    def outputs(self, words: np.ndarray, task: int) -> np.ndarray:
        """Return a task's outputs [..., T, C] from the output memory [..., T, token_pitch]."""
        count, pitch = self.pixel_outputs[task], self.pixel_pitches[task]
        rows = words[..., : self.pixels * pitch].reshape(*words.shape[:-1], self.pixels, pitch)
        return rows[..., :count].reshape(*words.shape[:-1], self.pixels * count)
