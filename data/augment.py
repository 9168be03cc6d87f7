"""The training pipelines, each label kind changed as its geometry asks.

Built on torchvision's tv_tensors: images and id maps are its own kinds, depth and normals are kinds of ours whose
kernels are registered below, so that one call changes a whole sample consistently:
- ids (semseg, human_parts, saliency, edge): nearest neighbour; what comes into view is ignored (255);
- depth: nearest; divided by the zoom, as a camera that is that much nearer would see it; 0 (invalid) from outside;
- normals: nearest; x negated by a mirror, turned in the plane by a rotation; 0 (invalid) from outside.

Pipelines (`data.pipeline`), each a function of (sample, size, rng, normalisation): the rng decides everything random.
- simple: resize; mirror; a gain and an offset for each colour channel.
- m3vit: M3ViT's and Vandenhende's (their data/custom_transforms.py): mirror; zoom and rotation about the centre;
  resize to the network's size, aspect ratio not kept.
- invpt: ATRC's, InvPT's and TaskPrompter's (their data/augment.py): scaling 0.5 to 2; crop; mirror; photometric
  distortion; padding.
"""

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor
from torchvision import tv_tensors
from torchvision.transforms.v2 import functional as tv
from torchvision.transforms.v2.functional import register_kernel

from m3vit.data.network_input import image_tensor, normalise, padded_place
from m3vit.data.sample import Ranges, Sample
from m3vit.normalisation import Normalisation
from m3vit.tasks import IGNORE

NEAREST = tv.InterpolationMode.NEAREST_EXACT  # pixel centres; "nearest" would shift by up to half a pixel


class DepthMap(tv_tensors.TVTensor):
    """Depth [1, H, W] float32 in metres; 0 is invalid."""


class NormalMap(tv_tensors.TVTensor):
    """Unit normals [3, H, W] float32: x right, y up; the zero vector is invalid."""


def _like(result: Tensor, kind: type[tv_tensors.TVTensor]) -> Any:
    return result.as_subclass(kind)


def _resize_nearest(kind: type[tv_tensors.TVTensor]) -> Callable[..., Tensor]:
    def kernel(inpt: Tensor, size: list[int], interpolation: Any = None, **_: Any) -> Tensor:
        return _like(tv.resize(inpt.as_subclass(Tensor), size, interpolation=NEAREST), kind)

    return kernel


def _crop(kind: type[tv_tensors.TVTensor]) -> Callable[..., Tensor]:
    def kernel(inpt: Tensor, top: int, left: int, height: int, width: int) -> Tensor:
        return _like(inpt.as_subclass(Tensor)[..., top : top + height, left : left + width], kind)

    return kernel


def _affine_nearest(inpt: Tensor, angle: float, translate: Any, scale: float, shear: Any) -> Tensor:
    mode = tv.InterpolationMode.NEAREST
    return tv.affine(inpt.as_subclass(Tensor), angle, translate, scale, shear, interpolation=mode, fill=0.0)


for _kind in (DepthMap, NormalMap):
    register_kernel(tv.resize, _kind)(_resize_nearest(_kind))
    register_kernel(tv.crop, _kind)(_crop(_kind))


@register_kernel(tv.horizontal_flip, DepthMap)
def _mirror_depth(inpt: Tensor) -> Tensor:
    return _like(inpt.as_subclass(Tensor).flip(-1), DepthMap)


@register_kernel(tv.horizontal_flip, NormalMap)
def _mirror_normals(inpt: Tensor) -> Tensor:
    return _like(inpt.as_subclass(Tensor).flip(-1) * torch.tensor([-1.0, 1.0, 1.0]).view(3, 1, 1), NormalMap)


@register_kernel(tv.affine, DepthMap)
def _affine_depth(inpt: Tensor, angle: float, translate: Any, scale: float, shear: Any, **_: Any) -> Tensor:
    return _like(_affine_nearest(inpt, angle, translate, scale, shear) / scale, DepthMap)


@register_kernel(tv.affine, NormalMap)
def _affine_normals(inpt: Tensor, angle: float, translate: Any, scale: float, shear: Any, **_: Any) -> Tensor:
    # tv.affine turns clockwise as seen, y of normals is up: their x and y turn by -angle.
    turn = torch.deg2rad(torch.tensor(-angle))
    cos, sin = turn.cos(), turn.sin()
    x, y, z = _affine_nearest(inpt, angle, translate, scale, shear)
    return _like(torch.stack([x * cos - y * sin, x * sin + y * cos, z]), NormalMap)


# --- tensors --------------------------------------------------------------------------------------------------------


def to_tv(sample: Sample) -> dict[str, Any]:
    """Turn a sample into tv_tensors: "image" and its labels, each [C, H, W]."""
    values: dict[str, Any] = {"image": tv_tensors.Image(image_tensor(sample.image))}
    for task, label in sample.labels.items():
        tensor = torch.from_numpy(np.ascontiguousarray(label))
        if task == "normals":
            values[task] = tensor.permute(2, 0, 1).contiguous().as_subclass(NormalMap)
        elif task == "depth":
            values[task] = tensor[None].as_subclass(DepthMap)
        else:
            values[task] = tv_tensors.Mask(tensor[None])
    return values


def to_labels(values: dict[str, Any]) -> dict[str, Tensor]:
    """Return the labels as losses take them.

    semseg, human_parts int64 [H, W]; saliency, edge uint8 [H, W]; depth float32 [H, W]; normals float32 [3, H, W].
    """
    labels = {}
    for task, value in values.items():
        if task == "image":
            continue
        tensor = value.as_subclass(Tensor).contiguous()
        tensor = tensor if task == "normals" else tensor[0]
        labels[task] = tensor.long() if task in ("semseg", "human_parts") else tensor
    # No part in view: nothing to learn from, as for an image without a person (AddIgnoreRegions of both pipelines).
    parts = labels.get("human_parts")
    if parts is not None and not ((parts > 0) & (parts != IGNORE)).any():
        labels["human_parts"] = torch.full_like(parts, IGNORE)
    return labels


# --- steps ----------------------------------------------------------------------------------------------------------


def each(values: dict[str, Any], function: Callable[..., Any], **arguments: Any) -> dict[str, Any]:
    """Apply a torchvision functional to every part of a sample."""
    return {name: function(value, **arguments) for name, value in values.items()}


def mirror(values: dict[str, Any]) -> dict[str, Any]:
    """Mirror left to right."""
    return each(values, tv.horizontal_flip)


def resize(values: dict[str, Any], size: tuple[int, int], cubic: bool = False) -> dict[str, Any]:
    """Resize everything; depth stays as it is (the scene does not come nearer)."""
    mode = tv.InterpolationMode.BICUBIC if cubic else tv.InterpolationMode.BILINEAR
    return {
        name: tv.resize(value, list(size), interpolation=mode, antialias=not cubic)
        if name == "image"
        else tv.resize(value, list(size), interpolation=NEAREST)
        for name, value in values.items()
    }


def zoom_rotate(values: dict[str, Any], zoom: float, angle_deg: float) -> dict[str, Any]:
    """Zoom in by `zoom` and turn counter-clockwise (as seen) about the image's centre; the size stays."""
    shared: dict[str, Any] = {"angle": -angle_deg, "translate": [0, 0], "scale": zoom, "shear": [0.0, 0.0]}
    nearest = {"interpolation": tv.InterpolationMode.NEAREST, "fill": IGNORE}
    bilinear = {"interpolation": tv.InterpolationMode.BILINEAR, "fill": 0}
    return {
        name: tv.affine(value, **shared, **(bilinear if name == "image" else nearest)) for name, value in values.items()
    }


def scale(values: dict[str, Any], factor: float) -> dict[str, Any]:
    """Resize by a factor, and divide depth by it."""
    height, width = values["image"].shape[-2:]
    scaled = resize(values, (max(1, int(height * factor)), max(1, int(width * factor))))
    if "depth" in scaled:
        scaled["depth"] = (scaled["depth"].as_subclass(Tensor) / factor).as_subclass(DepthMap)
    return scaled


def random_crop(values: dict[str, Any], size: tuple[int, int], rng: np.random.Generator) -> dict[str, Any]:
    """Crop to at most `size`: the first of 11 random places where no class fills 75 % or more, else the last."""
    height, width = values["image"].shape[-2:]
    for _ in range(11):
        top = int(rng.integers(0, max(height - size[0], 0) + 1))
        left = int(rng.integers(0, max(width - size[1], 0) + 1))
        box = {"top": top, "left": left, "height": min(height, size[0]), "width": min(width, size[1])}
        if "semseg" not in values:
            break
        counts = torch.bincount(tv.crop(values["semseg"], **box).flatten().long(), minlength=256)[:IGNORE]
        if (counts > 0).sum() > 1 and counts.max() < 0.75 * counts.sum():
            break
    return each(values, tv.crop, **box)


def photometric_distortion(image: NDArray[np.uint8], rng: np.random.Generator) -> NDArray[np.uint8]:
    """Change brightness (+-32), contrast and saturation (0.5 to 1.5) and hue (+-36 degrees), each half of the time.

    InvPT's PhotoMetricDistortion; contrast comes second or last, at random. RGB uint8 [H, W, 3].
    """

    def linear(pixels: NDArray[np.uint8], gain: float, offset: float) -> NDArray[np.uint8]:
        return np.clip(pixels.astype(np.float32) * gain + offset, 0, 255).astype(np.uint8)

    def contrast(pixels: NDArray[np.uint8]) -> NDArray[np.uint8]:
        return linear(pixels, rng.uniform(0.5, 1.5), 0) if rng.random() < 0.5 else pixels

    if rng.random() < 0.5:
        image = linear(image, 1, rng.uniform(-32, 32))
    contrast_first = rng.random() < 0.5
    if contrast_first:
        image = contrast(image)
    saturation = rng.uniform(0.5, 1.5) if rng.random() < 0.5 else 1.0
    hue_turns = rng.uniform(-0.1, 0.1) if rng.random() < 0.5 else 0.0  # 18 of OpenCV's 180 steps
    if saturation != 1 or hue_turns:
        hsv = np.array(Image.fromarray(image).convert("HSV"))
        hsv[..., 0] += np.uint8(round(hue_turns * 256) % 256)  # wraps, as hue does
        hsv[..., 1] = linear(hsv[..., 1], saturation, 0)
        planes = [Image.fromarray(np.ascontiguousarray(hsv[..., channel])) for channel in range(3)]
        image = np.array(Image.merge("HSV", planes).convert("RGB"))
    return image if contrast_first else contrast(image)


def pad(pixels: Tensor, labels: dict[str, Tensor], size: tuple[int, int]) -> tuple[Tensor, dict[str, Tensor]]:
    """Centre a normalised image [3, h, w] and its labels in `size`: padding is zero, and invalid or ignored."""
    rows, columns = padded_place(tuple(pixels.shape[-2:]), size)

    def place(tensor: Tensor, fill: float) -> Tensor:
        padded = tensor.new_full((*tensor.shape[:-2], *size), fill)
        padded[..., rows, columns] = tensor
        return padded

    fills = {"depth": 0.0, "normals": 0.0}
    return place(pixels, 0.0), {task: place(label, fills.get(task, IGNORE)) for task, label in labels.items()}


# --- pipelines ------------------------------------------------------------------------------------------------------

Pair = tuple[Tensor, dict[str, Tensor]]  # normalised input [3, *size] and labels at the same size


def simple(
    sample: Sample,
    size: tuple[int, int],
    rng: np.random.Generator,
    normalisation: Normalisation,
    flip: bool,
    colour: float,
) -> Pair:
    """See the module. `colour`: strength of the random gain and offset."""
    values = resize(to_tv(sample), size)
    if flip and rng.random() < 0.5:
        values = mirror(values)
    pixels = normalise(values["image"].as_subclass(Tensor), normalisation)
    if colour > 0:
        gain = 1 + colour * rng.uniform(-1, 1, (3, 1, 1))
        offset = colour * rng.normal(0, 1, (3, 1, 1))
        pixels = pixels * torch.from_numpy(gain).float() + torch.from_numpy(offset).float()
    return pixels, to_labels(values)


def m3vit(
    sample: Sample,
    size: tuple[int, int],
    rng: np.random.Generator,
    normalisation: Normalisation,
    flip: bool,
    ranges: Ranges,
) -> Pair:
    """See the module. `ranges`: those of the data set (m3vit.data.sample.FileSplit.m3vit_ranges).

    Two deliberate differences: what a rotation brings into view is ignored (the published code labels it as class 0
    and as no edge), and the image is turned with bilinear, not bicubic, interpolation.
    """
    values = to_tv(sample)
    if flip and rng.random() < 0.5:
        values = mirror(values)
    zooms, limit = ranges
    zoom = float(rng.uniform(zooms[0], zooms[-1]) if limit else rng.choice(zooms))
    angle = float(rng.uniform(-limit, limit))
    if zoom != 1 or angle:
        values = zoom_rotate(values, zoom, angle)
    values = resize(values, size, cubic=True)
    return normalise(values["image"].as_subclass(Tensor), normalisation), to_labels(values)


def invpt(
    sample: Sample, size: tuple[int, int], rng: np.random.Generator, normalisation: Normalisation, flip: bool
) -> Pair:
    """See the module."""
    values = random_crop(scale(to_tv(sample), float(rng.uniform(0.5, 2.0))), size, rng)
    if flip and rng.random() < 0.5:
        values = mirror(values)
    image = values["image"].as_subclass(Tensor).permute(1, 2, 0).contiguous().numpy()
    pixels = normalise(image_tensor(photometric_distortion(image, rng)), normalisation)
    return pad(pixels, to_labels(values), size)


def training_pair(
    pipeline: str,
    sample: Sample,
    size: tuple[int, int],
    rng: np.random.Generator,
    normalisation: Normalisation,
    *,
    ranges: Ranges | None = None,
    flip: bool = True,
    colour: float = 0.0,
) -> Pair:
    """Return an augmented input [3, *size] and its labels at the same size; m3vit takes the data set's `ranges`."""
    if pipeline == "m3vit":
        assert ranges is not None  # Config.check
        return m3vit(sample, size, rng, normalisation, flip, ranges)
    if pipeline == "invpt":
        return invpt(sample, size, rng, normalisation, flip)
    return simple(sample, size, rng, normalisation, flip, colour)
