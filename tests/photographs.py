"""Real photographs for tests, where they lie beside the checkout: NYU Depth v2, which never enters the repository.

`shared/data/nyud`, in a folder above the checkout, holds them with a script `expand.py` that writes them out in
NYUD_MT's layout: class labels and depth of the benchmark, normals and edges derived.
"""

import importlib.util
from pathlib import Path

import pytest

from tests.conftest import ROOT

WHERE = "shared/data/nyud"


def source() -> Path:
    """Return the folder of the photographs, or skip the test."""
    for folder in ROOT.parents:
        if (folder / WHERE / "expand.py").is_file():
            return folder / WHERE
    pytest.skip(f"no photographs: {WHERE} is in none of the folders above {ROOT}")


def write(root: Path, size: tuple[int, int], train: int, val: int) -> Path:
    """Write the first photographs of each split as a data root of images of `size`, or skip the test."""
    photographs = source()
    spec = importlib.util.spec_from_file_location("expand_nyud", photographs / "expand.py")
    assert spec and spec.loader
    expand = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(expand)
    for folder in ("images", "segmentation", "depth", "normals", "edge", "gt_sets"):
        (root / folder).mkdir(parents=True)
    for split, number in (("train", train), ("val", val)):
        names = (photographs / "gt_sets" / f"{split}.txt").read_text().split()[:number]
        (root / "gt_sets" / f"{split}.txt").write_text("".join(f"{name}\n" for name in names))
        for name in names:
            expand.one(name, root, size)
    return root
