"""Ray casting of places: geometry, camera, what each pixel hits, shaded images, and the search for a good view.

Needs trimesh and embreex.  N rays.  Camera axes here: x right, y down, z forward, and a ray's direction is
(x, y, 1) in them, so that the ray parameter of a hit is its z-depth.  Products with 3 x 3 matrices are written out
so that the result does not depend on how a BLAS splits the work.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import trimesh
from numpy.typing import NDArray
from trimesh.ray.ray_pyembree import RayMeshIntersector

from m3vit.data.synthetic.scenes import materials
from m3vit.data.synthetic.scenes.materials import FloatArray
from m3vit.data.synthetic.scenes.meshes import unit_meshes
from m3vit.data.synthetic.scenes.place import Light, Place
from m3vit.data.synthetic.scenes.solids import rotate

# Focal length over image width of NYUD's Kinect (518.9 px of 640, 63 degrees across). One value for all images: with
# a random one metric depth is ambiguous.
FOCAL_PER_WIDTH = 518.86 / 640

SUPERSAMPLE = 2  # image rays per pixel and axis; labels use the pixel's centre

PREVIEW_WIDTH = 32
CAMERAS_PER_PLACE = 8
MAX_PLACES = 20


@dataclass(frozen=True)
class Camera:
    """A pose: the position in the place and the rows right, down, forward of its axes."""

    position: FloatArray
    axes: FloatArray


@dataclass(frozen=True)
class Hits:
    """What the rays through the pixels' centres (H, W) hit first.

    `parts` are indices into the place's parts (-1: nothing), `depth` is z in metres (inf: nothing), `normals`
    (H, W, 3) are x right, y up, z towards the camera (zero vector: nothing).
    """

    parts: NDArray[np.int64]
    depth: FloatArray
    normals: FloatArray


def focal_px(width: int) -> float:
    """Return the focal length of images of this width; the principal point is the image's centre."""
    return FOCAL_PER_WIDTH * width


def _dot(a_N3: FloatArray, b_N3: FloatArray) -> FloatArray:
    return a_N3[:, 0] * b_N3[:, 0] + a_N3[:, 1] * b_N3[:, 1] + a_N3[:, 2] * b_N3[:, 2]


def _turn(points_N3: FloatArray, cos: FloatArray | float, sin: FloatArray | float) -> FloatArray:
    """Rotate points about z."""
    x, y, z = points_N3.T
    return np.stack([x * cos - y * sin, x * sin + y * cos, z], axis=1)


class Geometry:
    """All triangles of a place in an Embree tree, with the part each belongs to."""

    def __init__(self, place: Place) -> None:
        vertices, faces, part_of_face = [], [], []
        count = 0
        for index, placed in enumerate(place.parts):
            shape_vertices, shape_faces = unit_meshes()[placed.part.shape]
            local = shape_vertices * np.array(placed.part.size)
            if placed.part.turn is not None:
                local = rotate(local, placed.part.turn)
            local = local + np.array(placed.part.centre)
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

        self.parts = [placed.part for placed in place.parts]
        self.instances = np.array([placed.instance for placed in place.parts])
        self.origins = np.array([placed.origin for placed in place.parts])
        self.yaws_rad = np.array([placed.yaw_rad for placed in place.parts])
        self.centres = np.array([part.centre for part in self.parts])
        self.is_turned = np.array([part.turn is not None for part in self.parts])
        self.turns = np.array([np.eye(3) if part.turn is None else part.turn for part in self.parts])
        self.patterns = np.array([int(part.material.pattern) for part in self.parts])
        self.colours = np.array([part.material.colour for part in self.parts])
        self.accents = np.array([part.material.accent for part in self.parts])
        self.periods_m = np.array([part.material.period_m for part in self.parts])
        self.turns_rad = np.array([part.material.turn_rad for part in self.parts])
        self.glows = np.array([part.material.glow for part in self.parts])

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
        facing_N3 = _turn(normals_N3, cos_N, -sin_N)
        own = self.is_turned[part_N]
        if own.any():
            inverse = self.turns[part_N[own]].transpose(0, 2, 1)
            local_N3[own], facing_N3[own] = rotate(local_N3[own], inverse), rotate(facing_N3[own], inverse)
        axis_N = np.abs(facing_N3).argmax(axis=1)
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


def cast(geometry: Geometry, camera: Camera, size: tuple[int, int]) -> Hits:
    """Cast one ray per pixel of an image of `size` (height, width)."""
    origins_N3, directions_N3 = pixel_rays(camera, size)
    faces_N, depth_N = geometry.trace(origins_N3, directions_N3)
    hit_N = faces_N >= 0
    world_N3 = geometry.facing_normals(faces_N, directions_N3)
    right, down, forward = (np.broadcast_to(axis, world_N3.shape) for axis in camera.axes)
    normals_N3 = np.stack([_dot(world_N3, right), -_dot(world_N3, down), -_dot(world_N3, forward)], axis=1)
    return Hits(
        parts=np.where(hit_N, geometry.part_of_face[faces_N], -1).reshape(size),
        depth=depth_N.reshape(size),
        normals=np.where(hit_N[:, None], normals_N3, 0.0).reshape(*size, 3),
    )


def render_image(
    geometry: Geometry, place: Place, camera: Camera, size: tuple[int, int], rng: np.random.Generator
) -> NDArray[np.uint8]:
    """Shade the view under the place's lights with soft shadows, tone-map it and add sensor noise."""
    origins_N3, directions_N3 = pixel_rays(camera, size, SUPERSAMPLE)
    faces_N, depth_N = geometry.trace(origins_N3, directions_N3)
    hit_N = faces_N >= 0
    points_N3 = origins_N3 + np.where(hit_N, depth_N, 0.0)[:, None] * directions_N3
    normals_N3 = geometry.facing_normals(faces_N, directions_N3)
    light_N3 = place.draw_ambient(rng, normals_N3[:, 2:])
    for _ in range(place.draw_num_lights(rng)):
        light_N3 += _light_from(place.draw_light(rng), geometry, points_N3, normals_N3, rng)
    glow_N1 = geometry.glows[geometry.part_of_face[faces_N]][:, None]
    linear_N3 = geometry.albedo(faces_N, points_N3, normals_N3) * (light_N3 + glow_N1) * hit_N[:, None]
    linear_N3[~hit_N] = place.sky(directions_N3[~hit_N])
    height, width = size
    linear = linear_N3.reshape(height, SUPERSAMPLE, width, SUPERSAMPLE, 3).mean(axis=(1, 3)) * rng.uniform(0.9, 1.7)
    display = 1.15 * np.power(linear * (1 + linear / 4) / (1 + linear), 1 / 2.2)  # soft shoulder, then gamma
    display += rng.normal(0.0, rng.uniform(0.0, 0.02), display.shape)
    return (np.clip(display, 0.0, 1.0) * 255 + 0.5).astype(np.uint8)


def _light_from(
    light: Light, geometry: Geometry, points_N3: FloatArray, normals_N3: FloatArray, rng: np.random.Generator
) -> FloatArray:
    """Return the light (N, 3) that one lamp or the sun throws on the points."""
    towards_N3 = np.broadcast_to(light.position, points_N3.shape) if light.distant else light.position - points_N3
    distance_sq_N = _dot(towards_N3, towards_N3)
    cosine_N = np.clip(_dot(normals_N3, towards_N3), 0.0, None) / np.sqrt(distance_sq_N)
    jitter_N3 = rng.normal(0.0, light.blur, towards_N3.shape)  # a lamp of some size: soft shadows
    _, parameter_N = geometry.trace(points_N3 + 2e-3 * normals_N3, towards_N3 + jitter_N3)
    if light.distant:
        return (cosine_N * (parameter_N == np.inf) * light.power)[:, None] * light.tint
    lit_N = parameter_N > 0.98
    return (cosine_N * lit_N * light.power / (1 + distance_sq_N))[:, None] * light.tint


def random_camera(place: Place, rng: np.random.Generator) -> Camera:
    """Return a camera that looks at something in the place, rolled by a degree or two."""
    position, target = place.draw_view(rng)
    forward = target - position
    forward[:2] += 1e-3  # never straight down
    forward /= np.sqrt((forward * forward).sum())
    right = np.array([forward[1], -forward[0], 0.0]) / np.hypot(forward[0], forward[1])
    down = np.cross(forward, right)
    roll_rad = rng.normal(0, np.radians(2))
    cos, sin = np.cos(roll_rad), np.sin(roll_rad)
    return Camera(position, np.stack([right * cos + down * sin, down * cos - right * sin, forward]))


def find_view(
    build: Callable[[], Place],
    score: Callable[[Geometry, Hits], float],
    rng: np.random.Generator,
    size: tuple[int, int],
) -> tuple[Place, Geometry, Camera]:
    """Build places until one has a good view (`score` of a preview above 0) and return it with its best camera.

    After `MAX_PLACES` places without a good view (very long or tall images) the best of them all is returned.
    """
    preview = (max(2, round(PREVIEW_WIDTH * size[0] / size[1])), PREVIEW_WIDTH)
    best_score, best = -np.inf, None
    for _ in range(MAX_PLACES):
        place = build()
        geometry = Geometry(place)
        for _ in range(CAMERAS_PER_PLACE):
            camera = random_camera(place, rng)
            value = score(geometry, cast(geometry, camera, preview))
            if best is None or value > best_score:
                best_score, best = value, (place, geometry, camera)
        if best_score > 0:
            break
    assert best is not None
    return best
