"""`m3vit export onnx`: from a run folder to a checked package."""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

from m3vit.export.onnx.images import parity_images
from m3vit.export.onnx.package import export_package
from m3vit.export.onnx.parity import check_parity
from m3vit.training.checkpoint import Run

PARITY_IMAGES = 8  # validation images that the quick check picks from, beside noise


def export_run(
    run: Run,
    out: Path,
    *,
    opset: int = 20,
    size: tuple[int, int] | None = None,
    data_root: str | None = None,
    check_images: int | None = None,
    say: Callable[[str], None] = print,
    bar: Callable[[], AbstractContextManager[Callable[[int, int], None]]] | None = None,
) -> None:
    """Write the package of a run to `out`, compare it with torch, and say a line per file and per task.

    With `check_images` the comparison is the full one, over so many images; `bar` opens a progress bar, a function of
    (batches done, batches in all).
    """
    full = check_images is not None
    images = parity_images(run, data_root, check_images or PARITY_IMAGES, exactly=full)
    export_package(run.model, out, info=run.info, opset=opset, size=size, progress=say)
    for path in sorted(out.iterdir()):
        say(f"{path}: {path.stat().st_size / 1e6:.2f} MB")
    sources = " and ".join(f"{count} {name}" for name, count in images.sources.items())
    say(f"comparing with torch on {sources} images" + (", each at every size" if full else ""))
    with bar() if bar else nullcontext() as progress:
        report = check_parity(run.model, out, images, full=full, sources=images.sources, progress=progress)
    for task, result in report.items():
        say(f"{task}: {_summary(result)}")


def _summary(result: dict[str, Any]) -> str:
    """Return what the comparison of one task found, in words."""
    unseen, forced = (
        sum(len(experts) for experts in result[key].values()) for key in ("experts_not_hit", "experts_forced")
    )
    return (
        f"worst relative error {result['worst_relative_error']:.1e} ({result['worst_at']}) in "
        f"{result['comparisons']} comparisons"
        + (f"; {unseen} experts got no token and were not compared" if unseen else "")
        + (f"; {forced} experts got tokens from a forced router only" if forced else "")
        + (f"; {result['near_tie_images']} images with near ties" if result["near_tie_images"] else "")
    )
