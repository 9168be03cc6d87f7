"""A folder of somebody's own data, as it lies on a disk: odd sizes and endings, links, labels that some images lack."""

from pathlib import Path

import numpy as np
from PIL import Image

from tests.data.layouts import save_palette_png

CLASSES = ("sky", "road", "car")
VOID = 7
TURNED = "img_05"  # stored lying on its side
BARE = "img_11"  # without any label
IDS = [f"img_{index:02d}" if index % 5 else f"IMG {index:02d}" for index in range(12)]  # IMG 00, IMG 05, IMG 10
IDS[5] = TURNED
DESCRIPTION = """\
name: street
images: photos/{id}.*
tasks:
  semseg:
    kind: classes
    files: masks/{id}.png
    classes: [sky, road, car]
    ignore: [7]
  depth:
    kind: depth
    files: depth_mm/{id}.png
    unit: mm
    invalid: [0]
splits:
  val: 0.3
  seed: 0
unlabelled: leave_out
"""


def write_own(root: Path, description: str | None = DESCRIPTION) -> Path:
    """Write twelve photographs, eight with a mask, seven with depth, eleven with either; `description`: data.yaml."""
    rng = np.random.default_rng(0)
    for folder in ("photos", "masks", "depth_mm"):
        (root / folder).mkdir(parents=True, exist_ok=True)
    for index, name in enumerate(IDS):
        height, width = 30 + 3 * (index % 4), 44 + 2 * (index % 5)
        rows = np.arange(height)[:, None].repeat(width, 1)
        horizon = int(rng.integers(height // 3, height // 2))
        ids = np.where(rows < horizon, 0, 1).astype(np.uint8)
        ids[horizon + 2 : horizon + 8, 5:15] = 2
        ids[0, 0] = VOID
        pixels = np.array([[180, 200, 240], [90, 90, 90], [200, 30, 30]] + [[0, 0, 0]] * 5)[ids]
        picture = Image.fromarray((pixels + rng.integers(-9, 10, pixels.shape)).clip(0, 255).astype(np.uint8))
        ending = ("jpg", "png", "JPG")[index % 3]
        if name == TURNED:
            exif = Image.Exif()
            exif[0x0112] = 6  # turn it clockwise to see it upright
            picture.transpose(Image.Transpose.ROTATE_90).save(root / "photos" / f"{name}.jpg", exif=exif, quality=95)
        else:
            picture.save(root / "photos" / f"{name}.{ending}", "PNG" if ending == "png" else "JPEG")
        if name != BARE and index % 3 != 2:
            save_palette_png(root / "masks" / f"{name}.png", ids)
        if name != BARE and (index % 2 == 0 or index % 3 == 2):
            depth = 4000 + 500 * (height - rows)
            depth[:2] = 0
            Image.fromarray(depth.astype(np.uint16)).save(root / "depth_mm" / f"{name}.png")
    linked = root / "photos" / "img_01.png"
    linked.rename(root / "elsewhere.png")
    linked.symlink_to("../elsewhere.png")
    if description is not None:
        (root / "data.yaml").write_text(description)
    return root
