"""Pictures of predictions: plain, and laid over the image with a legend. numpy and pillow only.

Shapes: H x W pixels; pictures are RGB uint8 [H, W, 3]. Predictions are those of `Package.predict`.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

Colour = tuple[int, int, int]
Range = tuple[float, float]

# Nine points of matplotlib's inferno map (public domain, CC0), dark to bright, even in perceived lightness.
RAMP: tuple[Colour, ...] = (
    (0, 0, 4),
    (31, 12, 72),
    (85, 15, 109),
    (136, 34, 106),
    (186, 54, 85),
    (227, 89, 51),
    (249, 140, 10),
    (249, 201, 50),
    (252, 255, 164),
)
# What the colours of a normals picture, (n + 1) / 2, mean. x right, y up, z towards the camera.
NORMALS_KEY: tuple[tuple[str, Colour], ...] = (
    ("right", (255, 128, 128)),
    ("left", (0, 128, 128)),
    ("up", (128, 255, 128)),
    ("down", (128, 0, 128)),
    ("towards the camera", (128, 128, 255)),
)
_MARK: Colour = (255, 0, 160)  # of edges and salient pixels over the image: a colour that photographs seldom hold
_OPACITY = 0.6  # of the other predictions over the image
_INK, _PAPER, _BORDER = (28, 39, 51), (255, 255, 255), (154, 167, 179)
_MIN_WIDTH = 320  # pixels that the text of a legend needs
_MAX_SIDE = 4096  # of a picture that is enlarged for its legend
_OTHER_CLASSES: Colour = (0, 0, 0)


def _ramp(position: NDArray[Any]) -> NDArray[np.uint8]:
    """Colours [..., 3] of positions 0 (dark) to 1 (bright)."""
    ramp = np.array(RAMP, np.float32)
    scaled = np.clip(position, 0, 1) * (len(ramp) - 1)
    channels = [np.interp(scaled, np.arange(len(ramp)), ramp[:, channel]) for channel in range(3)]
    return np.rint(np.stack(channels, axis=-1)).astype(np.uint8)


def depth_limits(depth: NDArray[np.float32]) -> Range | None:
    """Return the nearest and farthest depth in metres without the extreme 2 % on each side, None if none is valid."""
    valid = depth[np.isfinite(depth) & (depth > 0)]
    if not valid.size:
        return None
    near, far = np.percentile(valid, (2, 98))
    return float(near), float(far)


def _depth_picture(depth: NDArray[np.float32], depth_range: Range | None) -> NDArray[np.uint8]:
    """Near is bright; invalid (<= 0) pixels are black. Without a range: the picture's own, less its extreme 2 %."""
    limits = depth_range or depth_limits(depth)
    if limits is None:
        return np.zeros((*depth.shape, 3), np.uint8)
    near, far = limits
    valid = np.isfinite(depth) & (depth > 0)
    share = (far - np.where(valid, depth, far)) / max(far - near, 1e-6)
    return np.where(valid[..., None], _ramp(share), 0).astype(np.uint8)


def colourise(
    array: NDArray[Any], task: str, manifest: dict[str, Any], depth_range: Range | None = None
) -> NDArray[np.uint8]:
    """Turn a prediction of `Package.predict` into a picture to look at, uint8 [H, W, 3]."""
    entry = manifest["tasks"][task]
    return paint(array, entry["decode"], entry.get("palette", ()), depth_range)


def paint(
    array: NDArray[Any],
    kind: str,
    palette: Sequence[Sequence[int]] = (),
    depth_range: Range | None = None,
) -> NDArray[np.uint8]:
    """Turn a decoded prediction or a label of a kind (see `runtime.decode`) into a picture, uint8 [H, W, 3].

    argmax: the palette's colours, other ids black. identity (depth, metres): near bright, far dark, over
    `depth_range` or the picture's own. unit_vector: (n + 1) / 2. sigmoid: dark on white.
    """
    if kind == "argmax":
        colours = np.zeros((256, 3), np.uint8)
        colours[: len(palette)] = palette
        return colours[array]
    if kind == "unit_vector":
        return np.rint(np.clip((array + 1) / 2, 0, 1) * 255).astype(np.uint8)
    if kind == "sigmoid":
        grey = np.rint((1 - np.clip(array, 0, 1)) * 255).astype(np.uint8)
        return np.repeat(grey[..., None], 3, axis=-1)
    return _depth_picture(array, depth_range)


def blend(
    image: NDArray[np.uint8],
    array: NDArray[Any],
    kind: str,
    palette: Sequence[Sequence[int]] = (),
    depth_range: Range | None = None,
) -> NDArray[np.uint8]:
    """Lay a prediction over its image, uint8 [H, W, 3]; arguments as those of `paint`.

    Classes, depth and normals keep their colours over a grey image. A probability is the opacity of one strong colour
    over the image as it is, so that what is improbable stays visible.
    """
    if kind == "sigmoid":
        share = np.clip(array, 0, 1)[..., None].astype(np.float32)
        mixed = image + share * (np.array(_MARK, np.float32) - image)
    else:
        grey = image @ np.array([0.299, 0.587, 0.114], np.float32)
        picture = paint(array, kind, palette, depth_range)
        mixed = np.float32(_OPACITY) * picture + np.float32(1 - _OPACITY) * grey[..., None]
    return np.rint(mixed).astype(np.uint8)


@dataclass(frozen=True)
class Swatches:
    """A legend of colours and what they mean, in columns as wide as the longest of `names` needs."""

    items: tuple[tuple[str, Colour], ...]
    names: tuple[str, ...]
    rows: int | None = None  # of fixed height, or as high as the items need


@dataclass(frozen=True)
class Scale:
    """A legend of a continuous value: colours from left to right, and the values where they are."""

    title: str
    colours: NDArray[np.uint8]  # [N, 3]
    low: float
    high: float


def legend(
    array: NDArray[Any],
    task: str,
    entry: dict[str, Any],
    depth_range: Range | None = None,
    rows: int | None = None,
    plain: bool = False,
) -> Swatches | Scale:
    """Return the legend of a prediction laid over an image (`blend`) or, if `plain`, of its picture (`paint`).

    Classes: those in the picture, the largest first, with their share of it. With `rows` (a film) the legend has that
    many rows, and its items no shares and the order of their names, so that it flickers little.
    """
    kind = entry["decode"]
    if kind == "argmax":
        return _classes(array, entry, rows)
    if kind == "unit_vector":
        return Swatches(NORMALS_KEY, tuple(name for name, _ in NORMALS_KEY))
    if kind == "sigmoid":
        colours = np.linspace((255, 255, 255), (0, 0, 0) if plain else _MARK, 256)
        return Scale(f"{task}, probability", np.rint(colours).astype(np.uint8), 0, 1)
    near, far = depth_range or depth_limits(array) or (0.0, 1.0)
    return Scale(f"{task}, {entry.get('unit', 'm')}", _ramp(np.linspace(1, 0, 256)), near, far)


def _classes(ids: NDArray[np.uint8], entry: dict[str, Any], rows: int | None) -> Swatches:
    palette, names = entry["palette"], class_names(entry)
    counts = np.bincount(ids.ravel(), minlength=256)
    present = [int(index) for index in np.argsort(-counts, kind="stable") if counts[index]]
    texts = {index: names[index] if index < len(names) else f"class {index}" for index in present}
    longest = tuple(names) or tuple(texts.values())
    if rows is None:
        texts = {index: f"{text} {_percent(counts[index] / ids.size)}" for index, text in texts.items()}
        longest = tuple(texts.values())
    colours = {index: tuple(palette[index]) if index < len(palette) else _OTHER_CLASSES for index in present}
    return Swatches(tuple((texts[index], colours[index]) for index in present), longest, rows)


def class_names(entry: dict[str, Any]) -> list[str]:
    """Return the names of a task's classes, as people write them; numbers if the manifest has none."""
    names = entry.get("classes") or [f"class {index}" for index in range(len(entry.get("palette", ())))]
    return [str(name).replace("_", " ") for name in names]


def _percent(share: float) -> str:
    return "< 1 %" if share < 0.01 else f"{100 * share:.0f} %"


def overlay(
    image: NDArray[np.uint8],
    array: NDArray[Any],
    task: str,
    manifest: dict[str, Any],
    depth_range: Range | None = None,
    rows: int | None = None,
) -> NDArray[np.uint8]:
    """Lay a prediction over its image and add a legend below: uint8 [H', W', 3].

    Small images are enlarged by a whole number first, so that the legend is readable. `depth_range` and `rows` as in
    `legend`; with `rows`, all pictures of one image size have one size.
    """
    entry = manifest["tasks"][task]
    depth_range = depth_range or (depth_limits(array) if entry["decode"] == "identity" else None)
    picture = blend(image, array, entry["decode"], entry.get("palette", ()), depth_range)
    height, width = picture.shape[:2]
    factor = max(1, min(math.ceil(_MIN_WIDTH / width), _MAX_SIDE // height))
    picture = picture.repeat(factor, axis=0).repeat(factor, axis=1)
    panel = _draw(legend(array, task, entry, depth_range, rows), max(width * factor, _MIN_WIDTH))
    beside = panel.shape[1] - picture.shape[1]
    padded = np.pad(picture, ((0, 0), (beside // 2, beside - beside // 2), (0, 0)), constant_values=255)
    return np.concatenate([padded, panel])


def _draw(content: Swatches | Scale, width: int) -> NDArray[np.uint8]:
    """Draw a legend as a panel of this width."""
    size = min(max(width // 45, 12), 32)  # of the text, pixels
    font: Any = ImageFont.load_default(size)
    if isinstance(content, Scale):
        return _draw_scale(content, width, size, font)
    return _draw_swatches(content, width, size, font)


def _draw_swatches(content: Swatches, width: int, size: int, font: Any) -> NDArray[np.uint8]:
    line, pad = round(size * 1.6), size
    cell = max(round(font.getlength(name)) for name in ("", *content.names)) + 3 * size
    columns = max(1, (width - pad) // cell)
    items = content.items
    rows = content.rows or max(1, math.ceil(len(items) / columns))
    left_out = len(items) - rows * columns
    if left_out > 0:
        items = items[: rows * columns - 1]
    if content.rows:  # the largest classes stay, in the order of their names
        items = tuple(sorted(items))
    panel = Image.new("RGB", (width, rows * line + pad), _PAPER)
    draw = ImageDraw.Draw(panel)
    for index, (name, colour) in enumerate(items):
        x, y = pad + index % columns * cell, pad // 2 + index // columns * line + (line - size) // 2
        draw.rectangle((x, y, x + size, y + size), fill=colour, outline=_BORDER)
        draw.text((x + 1.5 * size, y + size / 2), name, fill=_INK, font=font, anchor="lm")
    if left_out > 0:
        x, y = pad + (columns - 1) * cell, pad // 2 + (rows - 1) * line + line // 2
        draw.text((x, y), f"and {left_out + 1} more", fill=_INK, font=font, anchor="lm")
    return np.asarray(panel)


def _draw_scale(content: Scale, width: int, size: int, font: Any) -> NDArray[np.uint8]:
    pad, thickness = size, size
    panel = Image.new("RGB", (width, round(4.6 * size)), _PAPER)
    draw = ImageDraw.Draw(panel)
    draw.text((pad, 0.9 * size), content.title, fill=_INK, font=font, anchor="lm")
    length, top = width - 2 * pad, round(1.7 * size)
    bar = Image.fromarray(content.colours[None]).resize((length, thickness), Image.Resampling.BILINEAR)
    panel.paste(bar, (pad, top))
    draw.rectangle((pad - 1, top - 1, pad + length, top + thickness), outline=_BORDER)
    for value, text in ticks(content.low, content.high):
        x = pad + (value - content.low) / max(content.high - content.low, 1e-12) * (length - 1)
        draw.line((x, top + thickness, x, top + thickness + size // 4), fill=_INK)
        half = font.getlength(text) / 2  # kept within the panel
        draw.text((min(max(x, half), width - half), top + 1.9 * size), text, fill=_INK, font=font, anchor="mm")
    return np.asarray(panel)


def ticks(low: float, high: float) -> list[tuple[float, str]]:
    """Return up to seven round values from `low` to `high`, with their texts; the ends if no round value is between."""
    if not high > low:
        return [(low, f"{low:.3g}")]
    step = 10.0 ** math.floor(math.log10((high - low) / 4))
    step = next(factor * step for factor in (1, 2, 5, 10) if (high - low) / (factor * step) < 6.5)
    digits = max(0, -math.floor(math.log10(step)))
    first = math.ceil(low / step - 1e-9)
    return [(index * step, f"{index * step:.{digits}f}") for index in range(first, math.floor(high / step + 1e-9) + 1)]
