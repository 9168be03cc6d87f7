"""Predict image files with an exported package. No torch."""

from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps, UnidentifiedImageError

from m3vit.errors import InputError
from m3vit.export.runtime import Package, colourise
from m3vit.files import atomic_path


def predict_files(
    package_dir: Path,
    task: str,
    images: list[Path],
    out: Path,
    *,
    raw: bool = False,
    resize: bool = False,
    threads: int = 1,
) -> list[Path]:
    """Predict a task for each image, and return the files written to `out` (created if needed).

    `<stem>_<task>.png` is a picture to look at (`runtime.colourise`); with `raw`, `<stem>_<task>.npy` is the
    prediction itself (`Package.predict`, which also says what `resize` does). Every name is checked before the first
    image is run. Raises InputError for a bad package, task or image, two images of one stem, and an `out` where a
    picture would overwrite one of the images.
    """
    package = Package.load(package_dir, threads=threads)
    package.entry(task)
    if not images:
        raise InputError("no images: name at least one")
    inputs = {image.resolve() for image in images}
    by_stem: dict[str, Path] = {}
    for image in images:
        if not image.is_file():
            raise InputError(f"{image} not found: give image files")
        if image.stem in by_stem:
            raise InputError(
                f"{by_stem[image.stem]} and {image} would both become {image.stem}_{task}.png: predict them separately"
            )
        by_stem[image.stem] = image
        if (out / f"{image.stem}_{task}.png").resolve() in inputs:
            raise InputError(f"{image.stem}_{task}.png would overwrite an image of that name: choose another folder")
    if out.exists() and not out.is_dir():
        raise InputError(f"{out} is a file: give a folder for the predictions")
    out.mkdir(parents=True, exist_ok=True)
    written = []
    for stem, image in by_stem.items():
        try:
            prediction = package.predict(read_image(image), task, resize=resize)
        except InputError as error:
            raise InputError(f"{image}: {error}" if str(image) not in str(error) else str(error)) from error
        picture = out / f"{stem}_{task}.png"
        with atomic_path(picture) as temporary:
            Image.fromarray(colourise(prediction, task, package.manifest)).save(temporary, format="PNG")
        written.append(picture)
        if raw:
            with atomic_path(out / f"{stem}_{task}.npy") as temporary:
                np.save(temporary, prediction)
            written.append(out / f"{stem}_{task}.npy")
    return written


def read_image(path: Path) -> NDArray[np.uint8]:
    """Read an image file as RGB uint8 [H, W, 3], upright, or raise InputError naming it."""
    try:
        with Image.open(path) as file:
            upright: Any = ImageOps.exif_transpose(file)  # cameras note which way they were held
            if upright.mode.startswith(("I", "F")):  # pillow would clip 16-bit values to 255
                raise InputError(f"{path} has more than 8 bits a channel ({upright.mode}): give an 8-bit RGB image")
            return np.asarray(upright.convert("RGB"))
    except FileNotFoundError:
        raise InputError(f"{path} not found: give image files") from None
    except (UnidentifiedImageError, OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(f"{path} cannot be read as an image: {error}") from error
