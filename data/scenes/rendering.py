"""Ray casting of rooms: camera, exact labels, shaded images, and the choice of a view worth learning from.

Needs trimesh and embreex.  N rays.  Camera axes here: x right, y down, z forward, and a ray's direction is
(x, y, 1) in them, so that the ray parameter of a hit is its z-depth.  Products with 3 x 3 matrices are written out
so that the result does not depend on how a BLAS splits the work.
"""

from dataclasses import dataclass
from functools import cache

import numpy as np
import trimesh
from numpy.typing import NDArray
from trimesh.ray.ray_pyembree import RayMeshIntersector

from m3vit.data.scenes import materials
from m3vit.data.scenes.furniture import Shape
from m3vit.data.scenes.materials import FloatArray
from m3vit.data.scenes.room import Room
from m3vit.tasks import NYUD_CLASSES

CLASS_IDS = {name: index + 1 for index, name in enumerate(NYUD_CLASSES)}  # as written on disk; 0 = unlabelled

# Focal length over image width of NYUD's Kinect (518.9 px of 640, 63 degrees across). One value for all images: with
# a random one metric depth is ambiguous.
FOCAL_PER_WIDTH = 518.86 / 640

SUPERSAMPLE = 2  # image rays per pixel and axis; labels use the pixel's centre
# Second difference of inverse depth over inverse depth: zero on planes, above this at jumps within an object.
BEND_THRESHOLD = 0.12

PREVIEW_WIDTH = 32
CAMERAS_PER_ROOM = 8
MAX_ROOMS = 20
STRUCTURE = ("wall", "floor", "ceiling", "door", "window")


@dataclass(frozen=True)
class Camera:
    """A pose: the position in the room and the rows right, down, forward of its axes."""

    position: FloatArray
    axes: FloatArray


@dataclass(frozen=True)
class Labels:
    """What a camera sees at its pixels' centres (H, W).

    Depth is z in metres (0 where nothing is hit), normals are x right, y up, z towards the camera, segmentation is
    NYUD ids (0 where nothing is hit), edge is 0 or 1.
    """

    depth: NDArray[np.float32]
    normals: NDArray[np.float32]
    segmentation: NDArray[np.uint8]
    edge: NDArray[np.float32]


@dataclass(frozen=True)
class Scene:
    """An RGB image (H, W, 3) uint8 with its labels and the camera that took it."""

    image: NDArray[np.uint8]
    labels: Labels
    camera: Camera


def focal_px(width: int) -> float:
    """Return the focal length of images of this width; the principal point is the image's centre."""
    return FOCAL_PER_WIDTH * width


@cache
def unit_meshes() -> dict[Shape, tuple[FloatArray, NDArray[np.int64]]]:
    """Return vertices and faces of each shape, in the unit cube around the origin."""
    ball = trimesh.creation.icosphere(subdivisions=3, radius=1.0)
    cylinder = trimesh.creation.cylinder(radius=0.5, height=1.0, sections=24)
    directions = np.asarray(ball.vertices)
    tube = np.asarray(cylinder.vertices)
    shade = tube * np.where(tube[:, 2:] > 0, (0.6, 0.6, 1.0), 1.0)
    cushion = 0.5 * directions / np.power(np.power(np.abs(directions), 4.0).sum(axis=1, keepdims=True), 0.25)
    box = trimesh.creation.box()
    return {
        Shape.BOX: (np.asarray(box.vertices), np.asarray(box.faces)),
        Shape.CYLINDER: (tube, np.asarray(cylinder.faces)),
        Shape.SHADE: (shade, np.asarray(cylinder.faces)),
        Shape.SPHERE: (0.5 * directions, np.asarray(ball.faces)),
        Shape.CUSHION: (cushion, np.asarray(ball.faces)),
    }


def _dot(a_N3: FloatArray, b_N3: FloatArray) -> FloatArray:
    return a_N3[:, 0] * b_N3[:, 0] + a_N3[:, 1] * b_N3[:, 1] + a_N3[:, 2] * b_N3[:, 2]


def _turn(points_N3: FloatArray, cos: FloatArray | float, sin: FloatArray | float) -> FloatArray:
    """Rotate points about z."""
    x, y, z = points_N3.T
    return np.stack([x * cos - y * sin, x * sin + y * cos, z], axis=1)


class Geometry:
    """All triangles of a room in an Embree tree, with the part each belongs to."""

    def __init__(self, room: Room) -> None:
        vertices, faces, part_of_face = [], [], []
        count = 0
        for index, placed in enumerate(room.parts):
            shape_vertices, shape_faces = unit_meshes()[placed.part.shape]
            local = shape_vertices * np.array(placed.part.size) + np.array(placed.part.centre)
            turned = _turn(local, float(np.cos(placed.yaw_rad)), float(np.sin(placed.yaw_rad)))
            vertices.append(turned + np.array(placed.origin))
            faces.append(shape_faces + count)
            part_of_face.append(np.full(len(shape_faces), index))
            count += len(local)
        self.mesh = trimesh.Trimesh(np.concatenate(vertices), np.concatenate(faces), process=False)
        self._tracer = RayMeshIntersector(self.mesh)
        corners = np.asarray(self.mesh.vertices)[np.asarray(self.mesh.faces)]
        normals = np.cross(corners[:, 1] - corners[:, 0], corners[:, 2] - corners[:, 0])
        self.normals = normals / (np.sqrt(_dot(normals, normals))[:, None] + 1e-20)
        self.anchors = corners[:, 0]  # a point of each triangle's plane
        self.part_of_face = np.concatenate(part_of_face)

        parts = [placed.part for placed in room.parts]
        self.class_ids = np.array([CLASS_IDS[part.label] for part in parts], np.uint8)
        self.instances = np.array([placed.instance for placed in room.parts])
        self.origins = np.array([placed.origin for placed in room.parts])
        self.yaws_rad = np.array([placed.yaw_rad for placed in room.parts])
        self.centres = np.array([part.centre for part in parts])
        self.patterns = np.array([int(part.material.pattern) for part in parts])
        self.colours = np.array([part.material.colour for part in parts])
        self.accents = np.array([part.material.accent for part in parts])
        self.periods_m = np.array([part.material.period_m for part in parts])
        self.turns_rad = np.array([part.material.turn_rad for part in parts])
        self.glows = np.array([part.material.glow for part in parts])

    def trace(self, origins_N3: FloatArray, directions_N3: FloatArray) -> tuple[NDArray[np.int64], FloatArray]:
        """Return the first triangle hit by each ray (-1: none) and the ray parameter there (inf: none).

        Embree works in float32 and only picks the triangle; the parameter is that of the triangle's plane in float64.
        """
        faces_N = self._tracer.intersects_first(origins_N3, directions_N3)
        slope_N = _dot(directions_N3, self.normals[faces_N])
        slope_N = np.where(np.abs(slope_N) < 1e-9, 1e-9, slope_N)
        parameter_N = _dot(self.anchors[faces_N] - origins_N3, self.normals[faces_N]) / slope_N
        return faces_N, np.where(faces_N < 0, np.inf, parameter_N)

    def facing_normals(self, faces_N: NDArray[np.int64], directions_N3: FloatArray) -> FloatArray:
        """Return the triangles' unit normals on the side the rays come from."""
        normals_N3 = self.normals[faces_N]
        return np.where((_dot(normals_N3, directions_N3) > 0)[:, None], -normals_N3, normals_N3)

    def albedo(self, faces_N: NDArray[np.int64], points_N3: FloatArray, normals_N3: FloatArray) -> FloatArray:
        """Return the linear-light colour of surface points: materials are mapped along the part's nearest axis."""
        part_N = self.part_of_face[faces_N]
        cos_N, sin_N = np.cos(self.yaws_rad[part_N]), np.sin(self.yaws_rad[part_N])
        local_N3 = _turn(points_N3 - self.origins[part_N], cos_N, -sin_N) - self.centres[part_N]
        axis_N = np.abs(_turn(normals_N3, cos_N, -sin_N)).argmax(axis=1)
        across_N = np.where(axis_N == 0, local_N3[:, 1], local_N3[:, 0])
        up_N = np.where(axis_N == 2, local_N3[:, 1], local_N3[:, 2])
        cos_N, sin_N = np.cos(self.turns_rad[part_N]), np.sin(self.turns_rad[part_N])
        u_N = (across_N * cos_N + up_N * sin_N) / self.periods_m[part_N]
        v_N = (up_N * cos_N - across_N * sin_N) / self.periods_m[part_N]
        colours_N3 = materials.evaluate(
            self.patterns[part_N], u_N, v_N, self.colours[part_N], self.accents[part_N], part_N
        )
        return np.power(colours_N3, 2.2)


def pixel_rays(camera: Camera, size: tuple[int, int], supersample: int = 1) -> tuple[FloatArray, FloatArray]:
    """Return origins and directions (N, 3) of the rays through the (sub)pixel centres, row by row."""
    height, width = size
    focal = focal_px(width)
    y, x = np.meshgrid(
        ((np.arange(height * supersample) + 0.5) / supersample - height / 2) / focal,
        ((np.arange(width * supersample) + 0.5) / supersample - width / 2) / focal,
        indexing="ij",
    )
    right, down, forward = camera.axes
    directions_N3 = x.reshape(-1, 1) * right + y.reshape(-1, 1) * down + forward
    return np.broadcast_to(camera.position, directions_N3.shape), directions_N3


def render_labels(geometry: Geometry, camera: Camera, size: tuple[int, int]) -> Labels:
    """Cast one ray per pixel and return the exact labels."""
    origins_N3, directions_N3 = pixel_rays(camera, size)
    faces_N, depth_N = geometry.trace(origins_N3, directions_N3)
    hit_N, part_N = faces_N >= 0, geometry.part_of_face[faces_N]
    world_N3 = geometry.facing_normals(faces_N, directions_N3)
    right, down, forward = (np.broadcast_to(axis, world_N3.shape) for axis in camera.axes)
    normals_N3 = np.stack([_dot(world_N3, right), -_dot(world_N3, down), -_dot(world_N3, forward)], axis=1)
    instances = np.where(hit_N, geometry.instances[part_N], -1).reshape(size)
    return Labels(
        depth=np.where(hit_N, depth_N, 0.0).reshape(size).astype(np.float32),
        normals=np.where(hit_N[:, None], normals_N3, 0.0).reshape(*size, 3).astype(np.float32),
        segmentation=np.where(hit_N, geometry.class_ids[part_N], 0).reshape(size).astype(np.uint8),
        edge=_edges(instances, depth_N.reshape(size)).astype(np.float32),
    )


def _edges(instances: NDArray[np.int64], depth: FloatArray) -> NDArray[np.bool_]:
    """Return borders between instances, and depth jumps within one that no plane explains."""
    edge = np.zeros(instances.shape, bool)
    edge[:, :-1] |= instances[:, 1:] != instances[:, :-1]
    edge[:-1] |= instances[1:] != instances[:-1]
    inverse = 1.0 / depth  # linear over the image of a plane; 0 where nothing is hit
    padded = np.pad(inverse, 1, mode="reflect", reflect_type="odd")  # continues planes beyond the border
    middle = padded[1:-1, 1:-1]
    bend = np.maximum(
        np.abs(padded[1:-1, 2:] - 2 * middle + padded[1:-1, :-2]),
        np.abs(padded[2:, 1:-1] - 2 * middle + padded[:-2, 1:-1]),
    )
    return edge | (bend > BEND_THRESHOLD * np.maximum(inverse, 1e-9))


def render_image(
    geometry: Geometry, room: Room, camera: Camera, size: tuple[int, int], rng: np.random.Generator
) -> NDArray[np.uint8]:
    """Shade the view under one or two lamps with soft shadows, tone-map it and add sensor noise."""
    origins_N3, directions_N3 = pixel_rays(camera, size, SUPERSAMPLE)
    faces_N, depth_N = geometry.trace(origins_N3, directions_N3)
    hit_N = faces_N >= 0
    points_N3 = origins_N3 + np.where(hit_N, depth_N, 0.0)[:, None] * directions_N3
    normals_N3 = geometry.facing_normals(faces_N, directions_N3)
    light_N3 = (rng.uniform(0.25, 0.5) * (1 + 0.15 * normals_N3[:, 2:])).repeat(3, axis=1)
    for _ in range(int(rng.integers(1, 3))):
        light_N3 += _lamp_light(geometry, room, points_N3, normals_N3, rng)
    glow_N1 = geometry.glows[geometry.part_of_face[faces_N]][:, None]
    linear_N3 = geometry.albedo(faces_N, points_N3, normals_N3) * (light_N3 + glow_N1) * hit_N[:, None]
    height, width = size
    linear = linear_N3.reshape(height, SUPERSAMPLE, width, SUPERSAMPLE, 3).mean(axis=(1, 3)) * rng.uniform(0.9, 1.7)
    display = 1.15 * np.power(linear * (1 + linear / 4) / (1 + linear), 1 / 2.2)  # soft shoulder, then gamma
    display += rng.normal(0.0, rng.uniform(0.0, 0.02), display.shape)
    return (np.clip(display, 0.0, 1.0) * 255 + 0.5).astype(np.uint8)


def _lamp_light(
    geometry: Geometry, room: Room, points_N3: FloatArray, normals_N3: FloatArray, rng: np.random.Generator
) -> FloatArray:
    """Return the light (N, 3) that a random lamp below the ceiling throws on the points."""
    x, y = rng.uniform(-0.4, 0.4) * room.width_m, rng.uniform(-0.4, 0.4) * room.depth_m
    position = np.array([x, y, room.height_m - rng.uniform(0.1, 0.5)])
    power = 3.0 * rng.uniform(0.5, 1.0)
    tint = 1 + rng.uniform(-0.12, 0.12) * np.array([1.0, 0.0, -1.0])
    towards_N3 = position - points_N3
    distance_sq_N = _dot(towards_N3, towards_N3)
    cosine_N = np.clip(_dot(normals_N3, towards_N3), 0.0, None) / np.sqrt(distance_sq_N)
    jitter_N3 = rng.normal(0.0, 0.06, towards_N3.shape)  # a lamp of some size: soft shadows
    _, parameter_N = geometry.trace(points_N3 + 2e-3 * normals_N3, towards_N3 + jitter_N3)
    lit_N = parameter_N > 0.98
    return (cosine_N * lit_N * power / (1 + distance_sq_N))[:, None] * tint


def _random_camera(room: Room, rng: np.random.Generator) -> Camera:
    """Return a camera at sitting or standing height that looks at a piece of furniture, rolled by a degree or two."""
    x, y = rng.uniform(-0.5, 0.5) * (room.width_m - 0.5), rng.uniform(-0.5, 0.5) * (room.depth_m - 0.5)
    position = np.array([x, y, rng.uniform(1.0, 1.8)])
    target = np.array([rng.uniform(-0.35, 0.35) * room.width_m, rng.uniform(-0.35, 0.35) * room.depth_m, 0.8])
    if room.targets:
        target = 0.25 * target + 0.75 * np.array(materials.pick(rng, room.targets))
    target[2] = rng.uniform(0.4, 1.3)
    forward = target - position
    forward[:2] += 1e-3  # never straight down
    forward /= np.sqrt((forward * forward).sum())
    right = np.array([forward[1], -forward[0], 0.0]) / np.hypot(forward[0], forward[1])
    down = np.cross(forward, right)
    roll_rad = rng.normal(0, np.radians(2))
    cos, sin = np.cos(roll_rad), np.sin(roll_rad)
    return Camera(position, np.stack([right * cos + down * sin, down * cos - right * sin, forward]))


def _view_score(labels: Labels) -> float:
    """Return how much there is to learn from a preview: entropy of the classes (bits), below 0 if it is rejected."""
    if not labels.depth.all():
        return -np.inf
    share = np.bincount(labels.segmentation.ravel(), minlength=len(NYUD_CLASSES) + 1) / labels.segmentation.size
    present = share[share > 0]
    entropy = float(-(present * np.log2(present)).sum())
    structure = sum(share[CLASS_IDS[name]] for name in STRUCTURE)
    good = (
        labels.depth.min() > 0.5
        and np.median(labels.depth) > 1.5
        and share.max() < 0.55
        and structure < 0.85
        and (share > 0.01).sum() >= 5
    )
    return entropy if good else entropy - 10.0


def render_scene(rng: np.random.Generator, size: tuple[int, int]) -> Scene:
    """Build random rooms until one has a good view, take the best of its cameras, and render it.

    After `MAX_ROOMS` rooms without a good view (very long or tall images) the best of them all is taken.
    """
    preview = (max(2, round(PREVIEW_WIDTH * size[0] / size[1])), PREVIEW_WIDTH)
    best_score, best = -np.inf, None
    for _ in range(MAX_ROOMS):
        room = Room(rng)
        geometry = Geometry(room)
        for _ in range(CAMERAS_PER_ROOM):
            camera = _random_camera(room, rng)
            score = _view_score(render_labels(geometry, camera, preview))
            if best is None or score > best_score:
                best_score, best = score, (room, geometry, camera)
        if best_score > 0:
            break
    assert best is not None
    room, geometry, camera = best
    labels = render_labels(geometry, camera, size)
    return Scene(render_image(geometry, room, camera, size, rng), labels, camera)
