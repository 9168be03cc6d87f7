"""The triangles of every `Shape`. Needs trimesh."""

from functools import cache

import numpy as np
import trimesh
from numpy.typing import NDArray

from m3vit.data.synthetic.scenes.materials import FloatArray
from m3vit.data.synthetic.scenes.solids import Shape

Mesh = tuple[FloatArray, NDArray[np.int64]]  # vertices (V, 3), faces (F, 3)


@cache
def unit_meshes() -> dict[Shape, Mesh]:
    """Return vertices and faces of each shape, in the unit cube around the origin."""
    ball = trimesh.creation.icosphere(subdivisions=3, radius=1.0)
    bead = trimesh.creation.icosphere(subdivisions=2, radius=0.5)
    cylinder = trimesh.creation.cylinder(radius=0.5, height=1.0, sections=24)
    directions = np.asarray(ball.vertices)
    tube = np.asarray(cylinder.vertices)
    shade = tube * np.where(tube[:, 2:] > 0, (0.6, 0.6, 1.0), 1.0)
    cone = tube * np.where(tube[:, 2:] > 0, (0.02, 0.02, 1.0), 1.0)
    cushion = 0.5 * directions / np.power(np.power(np.abs(directions), 4.0).sum(axis=1, keepdims=True), 0.25)
    box = trimesh.creation.box()
    corners = np.asarray(box.vertices)
    cabin = corners * np.where(corners[:, 2:] > 0, (0.84, 0.62, 1.0), 1.0)
    return {
        Shape.BOX: (corners, np.asarray(box.faces)),
        Shape.CYLINDER: (tube, np.asarray(cylinder.faces)),
        Shape.SHADE: (shade, np.asarray(cylinder.faces)),
        Shape.SPHERE: (0.5 * directions, np.asarray(ball.faces)),
        Shape.CUSHION: (cushion, np.asarray(ball.faces)),
        Shape.LIMB: _rounded_bar(roundness=5.0, lower=0.74),
        Shape.TRUNK: _rounded_bar(roundness=3.5, lower=0.8),
        Shape.BEAD: (np.asarray(bead.vertices), np.asarray(bead.faces)),
        Shape.CABIN: (cabin, np.asarray(box.faces)),
        Shape.CONE: (cone, np.asarray(cylinder.faces)),
    }


def _rounded_bar(roundness: float, lower: float, sections: int = 16, rings: int = 14) -> Mesh:
    """Return a surface of revolution about z: radius 0.5 tapering to `lower` of it below, with rounded ends.

    The ends are those of the superellipse |r|^2 + |2z|^roundness = 1.
    """
    height = -np.cos(np.linspace(0, np.pi, rings + 1))  # dense at the ends
    taper = lower + (1 - lower) * (height + 1) / 2
    radius = 0.5 * np.sqrt(np.clip(1 - np.abs(height) ** roundness, 0, None)) * taper
    angle = 2 * np.pi * np.arange(sections) / sections
    vertices = np.stack(
        np.broadcast_arrays(radius[:, None] * np.cos(angle), radius[:, None] * np.sin(angle), 0.5 * height[:, None]),
        axis=-1,
    ).reshape(-1, 3)
    ring, step = (index.ravel() for index in np.mgrid[:rings, :sections])
    here, right = ring * sections + step, ring * sections + (step + 1) % sections
    # The end rings are points, so half of their triangles have no area; no ray hits those.
    faces = np.concatenate([np.stack([here, right, right + sections], 1), np.stack([here, right + sections,
                                                                                    here + sections], 1)])  # fmt: skip
    return vertices, faces
