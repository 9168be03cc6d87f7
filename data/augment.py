"""The training pipelines, each label kind changed as its geometry asks.

Labels are moved by nearest neighbour; what comes into view is not labelled. What becomes of their values is their
kind's to say (m3vit.kinds: `mirrored`, `zoomed`, `turned`, `fill`):
- ids (semseg, human_parts, saliency, edge) stay; 255 (ignored) from outside;
- depth is divided by the zoom, as a camera that is that much nearer would see it; 0 (invalid) from outside;
- normals: x negated by a mirror, turned in the plane by a rotation; 0 (invalid) from outside.

Pipelines (`data.pipeline`), each a function of (sample, size, rng, normalisation): the rng decides everything random.
- simple: resize; mirror; a gain and an offset for each colour channel.
- m3vit: M3ViT's and Vandenhende's (their data/custom_transforms.py): mirror; zoom and rotation about the centre;
  resize to the network's size, aspect ratio not kept.
- invpt: ATRC's, InvPT's and TaskPrompter's (their data/transforms.py): scaling 0.5 to 2; crop; mirror; photometric
  distortion; padding.
"""

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor
from torchvision.transforms.v2 import functional as tv

from m3vit.data.network_input import image_tensor, normalise, padded_place
from m3vit.data.sample import Ranges, Sample
from m3vit.normalisation import Normalisation
from m3vit.tasks import IGNORE, TASKS, kind_of

NEAREST = tv.InterpolationMode.NEAREST_EXACT  # pixel centres; "nearest" would shift by up to half a pixel

Values = dict[str, Tensor]  # "image" uint8 [3, H, W], and the labels by task [C, H, W]

# --- tensors --------------------------------------------------------------------------------------------------------


def to_values(sample: Sample) -> Values:
    """Turn a sample into tensors: "image" and its labels, each [C, H, W]."""
    values = {"image": image_tensor(sample.image)}
    for task, label in sample.labels.items():
        tensor = torch.from_numpy(np.ascontiguousarray(label))
        values[task] = tensor[None] if tensor.ndim == 2 else tensor.permute(2, 0, 1).contiguous()
    return values


def to_labels(values: Values) -> dict[str, Tensor]:
    """Return the labels as losses take them.

    semseg, human_parts int64 [H, W]; saliency, edge uint8 [H, W]; depth float32 [H, W]; normals float32 [3, H, W].
    """
    return {task: kind_of(task).target(value.contiguous(), TASKS[task]) for task, value in labels_of(values).items()}


def labels_of(values: Values) -> Values:
    """Return the values but for the image."""
    return {name: value for name, value in values.items() if name != "image"}


# --- steps ----------------------------------------------------------------------------------------------------------


def mirror(values: Values) -> Values:
    """Mirror left to right."""
    mirrored = {task: kind_of(task).mirrored(value.flip(-1)) for task, value in labels_of(values).items()}
    return {"image": tv.horizontal_flip(values["image"]), **mirrored}


def resize(values: Values, size: tuple[int, int], cubic: bool = False) -> Values:
    """Resize everything; depth stays as it is (the scene does not come nearer)."""
    mode = tv.InterpolationMode.BICUBIC if cubic else tv.InterpolationMode.BILINEAR
    return {
        name: tv.resize(value, list(size), interpolation=mode, antialias=not cubic)
        if name == "image"
        else tv.resize(value, list(size), interpolation=NEAREST)
        for name, value in values.items()
    }


def zoom_rotate(values: Values, zoom: float, angle_deg: float) -> Values:
    """Zoom in by `zoom` and turn counter-clockwise (as seen) about the image's centre; the size stays."""
    # tv.affine turns clockwise as seen.
    shared: dict[str, Any] = {"angle": -angle_deg, "translate": [0, 0], "scale": zoom, "shear": [0.0, 0.0]}
    moved = {"image": tv.affine(values["image"], **shared, interpolation=tv.InterpolationMode.BILINEAR, fill=0)}
    for task, value in labels_of(values).items():
        kind = kind_of(task)
        placed = tv.affine(value, **shared, interpolation=tv.InterpolationMode.NEAREST, fill=kind.fill)
        moved[task] = kind.turned(kind.zoomed(placed, zoom), angle_deg)
    return moved


def scale(values: Values, factor: float) -> Values:
    """Resize by a factor, and divide depth by it."""
    height, width = values["image"].shape[-2:]
    scaled = resize(values, (max(1, int(height * factor)), max(1, int(width * factor))))
    return scaled | {task: kind_of(task).zoomed(value, factor) for task, value in labels_of(scaled).items()}


def random_crop(values: Values, size: tuple[int, int], rng: np.random.Generator) -> Values:
    """Crop to at most `size`: the first of 11 random places where no class fills 75 % or more, else the last.

    The classes are those of the task that `guides_crop`; without one, the first place is taken.
    """
    height, width = values["image"].shape[-2:]
    guide = next((value for task, value in labels_of(values).items() if TASKS[task].guides_crop), None)
    for _ in range(11):
        top = int(rng.integers(0, max(height - size[0], 0) + 1))
        left = int(rng.integers(0, max(width - size[1], 0) + 1))
        box = {"top": top, "left": left, "height": min(height, size[0]), "width": min(width, size[1])}
        if guide is None:
            break
        counts = torch.bincount(tv.crop(guide, **box).flatten().long(), minlength=256)[:IGNORE]
        if (counts > 0).sum() > 1 and counts.max() < 0.75 * counts.sum():
            break
    return {name: tv.crop(value, **box) for name, value in values.items()}


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

    return place(pixels, 0.0), {task: place(label, kind_of(task).fill) for task, label in labels.items()}


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
    values = resize(to_values(sample), size)
    if flip and rng.random() < 0.5:
        values = mirror(values)
    pixels = normalise(values["image"], normalisation)
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
    values = to_values(sample)
    if flip and rng.random() < 0.5:
        values = mirror(values)
    zooms, limit = ranges
    zoom = float(rng.uniform(zooms[0], zooms[-1]) if limit else rng.choice(zooms))
    angle = float(rng.uniform(-limit, limit))
    if zoom != 1 or angle:
        values = zoom_rotate(values, zoom, angle)
    values = resize(values, size, cubic=True)
    return normalise(values["image"], normalisation), to_labels(values)


def invpt(
    sample: Sample, size: tuple[int, int], rng: np.random.Generator, normalisation: Normalisation, flip: bool
) -> Pair:
    """See the module."""
    values = random_crop(scale(to_values(sample), float(rng.uniform(0.5, 2.0))), size, rng)
    if flip and rng.random() < 0.5:
        values = mirror(values)
    image = values["image"].permute(1, 2, 0).contiguous().numpy()
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
