"""Pictures of predictions: plain, and laid over the image with a legend. numpy and pillow only.

Shapes: H x W pixels; pictures are RGB uint8 [H, W, 3]. Predictions are those of `Package.predict`.
"""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

from m3vit.kinds import KINDS
from m3vit.kinds.pictures import Place
from m3vit.kinds.pictures import Range as Range
from m3vit.kinds.pictures import Scale as Scale
from m3vit.kinds.pictures import Swatches as Swatches

_INK, _PAPER, _BORDER = (28, 39, 51), (255, 255, 255), (154, 167, 179)
_MIN_WIDTH = 320  # pixels that the text of a legend needs
_MAX_SIDE = 4096  # of a picture that is enlarged for its legend


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
    """Turn a decoded prediction or a label of a kind (m3vit.kinds) into a picture, uint8 [H, W, 3].

    Classes get the palette's colours. Values are shown over `depth_range`, or the picture's own range.
    """
    return KINDS[kind].paint(array, palette, depth_range)


def blend(
    image: NDArray[np.uint8],
    array: NDArray[Any],
    kind: str,
    palette: Sequence[Sequence[int]] = (),
    depth_range: Range | None = None,
) -> NDArray[np.uint8]:
    """Lay a prediction over its image, uint8 [H, W, 3]; arguments as those of `paint`.

    Classes, depth and normals keep their colours over a grey image. A probability, squared, is the opacity of one
    strong colour over the image as it is, so that what is improbable stays visible.
    """
    return KINDS[kind].blend(image, array, palette, depth_range)


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
    return KINDS[entry["decode"]].legend(array, task, entry, depth_range, rows, plain)


def overlay(
    image: NDArray[np.uint8],
    array: NDArray[Any],
    task: str,
    manifest: dict[str, Any],
    depth_range: Range | None = None,
    rows: int | None = None,
) -> NDArray[np.uint8]:
    """Lay a prediction over its image and add a legend below: uint8 [H', W', 3]. Larger areas of a class are named.

    Small images are enlarged by a whole number first, smoothly, so that the legend is readable. `depth_range` and
    `rows` as in `legend`; with `rows`, all pictures of one image size have one size.
    """
    entry = manifest["tasks"][task]
    kind = KINDS[entry["decode"]]
    depth_range = depth_range or kind.limits(array)
    height, width = image.shape[:2]
    factor = max(1, min(math.ceil(_MIN_WIDTH / width), _MAX_SIDE // height))
    shown, drawn = image, array
    if factor > 1:
        larger = (width * factor, height * factor)
        shown = np.asarray(Image.fromarray(image).resize(larger, Image.Resampling.BICUBIC))
        drawn = kind.enlarged(array, factor)
    picture = blend(shown, drawn, entry["decode"], entry.get("palette", ()), depth_range)
    if rows is None:  # in a film names would jump about
        picture = _named(picture, kind.places(array, entry), factor)
    panel = _draw(legend(array, task, entry, depth_range, rows), max(width * factor, _MIN_WIDTH))
    beside = panel.shape[1] - picture.shape[1]
    padded = np.pad(picture, ((0, 0), (beside // 2, beside - beside // 2), (0, 0)), constant_values=255)
    return np.concatenate([padded, panel])


def _named(picture: NDArray[np.uint8], places: Sequence[Place], factor: int) -> NDArray[np.uint8]:
    """Write names into a picture that was enlarged by `factor`, where there is room for them."""
    size = _text_size(picture.shape[1])
    drawn, font = Image.fromarray(picture), _font(size)
    draw = ImageDraw.Draw(drawn)
    for place in places:
        side, length = place.side * factor, font.getlength(place.name)
        x, y = place.column * factor, place.row * factor
        if side >= max(2 * size, length / 2) and length / 2 < min(x, picture.shape[1] - x):
            draw.text((x, y), place.name, _PAPER, font, anchor="mm", stroke_width=size // 6, stroke_fill=_INK)
    return np.asarray(drawn)


def _text_size(width: int) -> int:
    return min(max(width // 45, 12), 32)  # pixels


def _font(size: int) -> Any:
    return ImageFont.load_default(size)


def _draw(content: Swatches | Scale, width: int) -> NDArray[np.uint8]:
    """Draw a legend as a panel of this width."""
    size = _text_size(width)
    font = _font(size)
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
