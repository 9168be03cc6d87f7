"""`m3vit panel`: one small picture of an image, its predictions side by side, and below them which experts made them.

Pictures are RGB uint8 [H, W, 3].
"""

import io
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

from m3vit.errors import InputError
from m3vit.evaluation.artefacts import is_export
from m3vit.evaluation.evaluate import torch_predictor
from m3vit.evaluation.protocols import network_image, prediction
from m3vit.evaluation.routing import PROTOCOL, check_routed
from m3vit.export.runtime.package import MANIFEST, Package, colourise
from m3vit.files import atomic_path, require_ending
from m3vit.images import read_image
from m3vit.label_sets import LABEL_SETS
from m3vit.report.charts import expert_colour
from m3vit.report.routed import patch_map
from m3vit.report.routing import coloured
from m3vit.run_folder import Run, load_run
from m3vit.tasks import kind_of, palette

MAX_BYTES = 150_000
COLOURS = 256
TALLEST = 4  # of an image, heights a width
LEAST_WIDTH = 300  # pixels, below which captions cannot be read
INK, PAPER = (28, 39, 51), (255, 255, 255)
Picture = NDArray[np.uint8]


@dataclass
class Tile:
    """A picture with its caption, drawn in `size` (height, width). `sharp`: enlarged and shrunk without blending."""

    caption: str
    picture: Picture
    sharp: bool


@dataclass
class Tiles:
    """What a panel shows: the predictions, below each the map of its experts (none of a package), and how many."""

    predictions: list[Tile] = field(default_factory=list)
    maps: list[Tile] = field(default_factory=list)
    experts: int = 0


def write_panel(
    folder: Path, image: Path, out: Path, *, no_input: bool = False, block: int | None = None, width: int = 1200
) -> tuple[int, int, int]:
    """Draw a run's or an ONNX package's predictions of an image into the png `out`: its height, width and bytes.

    With a run, the first expert of each patch in a `block` (default: the last with experts). `no_input`: without the
    image itself. A picture of more than 150 kB is drawn in fewer colours, then narrower than `width`. Raises InputError
    for a folder or an image that cannot be used, and for a block without experts.
    """
    require_ending(out, "picture", ".png")
    if width < LEAST_WIDTH:
        raise InputError(f"--width {width}: give at least {LEAST_WIDTH} pixels, for the captions")
    pixels = read_image(image)
    if pixels.shape[0] > TALLEST * pixels.shape[1]:
        raise InputError(f"{image} is more than {TALLEST} times as tall as wide, too tall for a panel: crop it")
    if is_export(folder):
        if not (folder / MANIFEST).is_file():
            raise InputError(f"{folder} is an HLS project: give the run folder or the ONNX package of its model")
        if block is not None:
            raise InputError(
                f"--block is of a run, and {folder} is a package, which does not say its routing: leave it out"
            )
        tiles = of_package(Package.load(folder), pixels)
    else:
        tiles = of_run(load_run(folder), pixels, block)
    shown = None if no_input else Tile("input", pixels, False)
    found = shrunk(tiles, shown, pixels.shape[0] / pixels.shape[1], width)
    if found is None:
        raise InputError(f"{out} would be larger than {MAX_BYTES} bytes at any width: show a smaller part of the image")
    canvas, data = found
    with atomic_path(out) as path:
        path.write_bytes(data)
    return canvas.height, canvas.width, len(data)


def shrunk(tiles: Tiles, image: Tile | None, aspect: float, width: int) -> tuple[Image.Image, bytes] | None:
    """Return the panel as it fits into `MAX_BYTES`, and its png: in all colours, in few, or narrower. None: not at all.

    Arguments are those of `draw`.
    """
    while width >= LEAST_WIDTH:
        canvas = draw(tiles, image, aspect, width)
        for colours in (None, COLOURS):
            if len(data := encode(canvas, colours)) <= MAX_BYTES:
                return canvas, data
        width = round(0.9 * width)
    return None


@torch.inference_mode()
def of_run(run: Run, image: Picture, block: int | None) -> Tiles:
    """Return a run's predictions of an image, as it is evaluated under protocol A, and the maps of its experts."""
    config, blocks = run.config.model, run.model.backbone.moe_indices
    predictor = torch_predictor(run.model)
    placed = network_image(PROTOCOL, "", image, predictor.size)
    logits, size = predictor.run([placed]), (image.shape[0], image.shape[1])
    tiles = Tiles(experts=config.num_experts)
    for task in config.tasks:
        guess = prediction(PROTOCOL, task, logits[task][0], placed, size)
        kind, classes = kind_of(task), LABEL_SETS[config.label_set].classes.get(task)
        picture = kind.paint(guess, palette(classes) if classes else (), kind.limits(guess))
        tiles.predictions.append(Tile(task, picture, kind.nearest))
    if block is not None:
        check_routed(run.model, run.folder)
        if block not in blocks:
            raise InputError(f"--block {block}: {run.folder} has experts in {', '.join(map(str, blocks))}")
    if blocks:
        shown = blocks[-1] if block is None else block
        firsts = patch_map(run.model, image)[blocks.index(shown)]
        tiles.maps = [Tile(f"experts of block {shown}", coloured(grid), True) for grid in firsts]
    return tiles


def of_package(package: Package, image: Picture) -> Tiles:
    """Return a package's predictions of an image, run at the size that the model was trained at."""
    tiles = Tiles()
    for task in package.tasks:
        guess = package.predict(image, task, resize=True)
        tiles.predictions.append(Tile(task, colourise(guess, task, package.manifest), kind_of(task).nearest))
    return tiles


def draw(tiles: Tiles, image: Tile | None, aspect: float, width: int) -> Image.Image:
    """Lay out a panel of this width; `aspect` is a tile's height over its width."""
    top: list[Tile | None] = [image, *tiles.predictions] if image else [*tiles.predictions]
    gap = max(4, width // 200)
    across = (width - gap * (len(top) - 1)) // len(top)
    down, text = round(across * aspect), max(9, min(across // 14, 20))
    font: Any = ImageFont.load_default(text)
    line = round(1.5 * text)
    rows = 2 if tiles.maps else 1
    canvas = Image.new(
        "RGB", (across * len(top) + gap * (len(top) - 1), rows * (line + down) + gap * (rows - 1)), PAPER
    )
    pen = ImageDraw.Draw(canvas)
    below: list[Tile | None] = [None] * (len(top) - len(tiles.maps)) + list(tiles.maps) if tiles.maps else []
    for row, tiles_of_row in enumerate([top, below]):
        y = row * (line + down + gap)
        for column, tile in enumerate(tiles_of_row):
            x = column * (across + gap)
            if tile is None:
                _legend(pen, tiles.experts, (x, y + line, across, down), text, font)
                continue
            pen.text((x + across / 2, y + line / 2), tile.caption, fill=INK, font=font, anchor="mm")
            how = Image.Resampling.NEAREST if tile.sharp else Image.Resampling.LANCZOS
            canvas.paste(Image.fromarray(tile.picture).resize((across, down), how), (x, y + line))
    return canvas


def _legend(pen: ImageDraw.ImageDraw, experts: int, place: tuple[int, int, int, int], text: int, font: Any) -> None:
    """Draw the colours of the experts, as many as have one of their own and fit, into (left, top, width, height)."""
    x, y, width, height = place
    pen.text((x + width / 2, y + text), "first expert of a patch", fill=INK, font=font, anchor="mm")
    columns = 4
    step = round(1.6 * text)
    for expert in range(min(experts, 20, columns * ((height - 2 * text) // step))):
        left = x + width // 8 + expert % columns * (width // 5)
        top = y + 2 * text + expert // columns * step
        pen.rectangle((left, top, left + text, top + text), fill=expert_colour(expert))
        pen.text((left + 1.4 * text, top + text / 2), str(expert), fill=INK, font=font, anchor="lm")


def encode(canvas: Image.Image, colours: int | None) -> bytes:
    """Return a picture as png, in so many colours (None: all)."""
    if colours is not None:
        canvas = canvas.quantize(colours, Image.Quantize.MEDIANCUT, kmeans=3)
    buffer = io.BytesIO()
    canvas.save(buffer, "PNG", optimize=True)
    return buffer.getvalue()
