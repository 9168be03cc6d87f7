"""Does a package compute what the model computes? Measured, with the answer written into the manifest.

Near ties: where the K-th and the next router score of a token are closer than rounding, torch and onnxruntime may
rightly pick different experts, and that token's output differs visibly. An image over the limit that has such a
token, in any layer, is counted as `near_tie_images` instead of failing; one without fails. Every image size needs
at least one image that is compared in earnest.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from m3vit.export.runtime import MANIFEST, Package
from m3vit.files import read_json, write_json
from m3vit.models.multitask import MultiTaskModel
from m3vit.models.router import Routing, expert_load

LIMIT = 1e-4  # worst allowed max |difference| / max |torch| of an image; float32 rounding gives 1e-7 to 1e-5
NEAR_TIE = 1e-5  # relative gap of router scores below which rounding may decide
THREADS = (1, 2)  # a race needs two
BATCH = 3
REPEATS = 3
NOISE_ROUNDS = 6


@dataclass
class _Record:
    """What the check found for one task."""

    worst: float = 0.0
    where: str = ""
    compared: int = 0
    near_tie_images: int = 0
    near_tie_tokens: int = 0
    loads: list[Tensor] = field(default_factory=list)  # tokens of each expert, int64 [E], by MoE layer
    failures: list[str] = field(default_factory=list)

    def not_hit(self, layers: list[int]) -> dict[str, list[int]]:
        """Return the experts that got no token, by block index; layers whose experts were all used are left out."""
        missing = {
            str(layer): (load == 0).nonzero().flatten().tolist() for layer, load in zip(layers, self.loads, strict=True)
        }
        return {layer: experts for layer, experts in missing.items() if experts}


@torch.no_grad()
def check_parity(model: MultiTaskModel, package_dir: Path, images: NDArray[np.float32]) -> dict[str, dict[str, Any]]:
    """Compare a package with the model it was exported from, over images float32 [n, 3, H, W], normalised; n >= 1.

    For each task: three image sizes (the trained one, a larger one, an odd non-square one; the fixed one alone if the
    graph has one), batches of 3 and 1, 1 and 2 threads, repeated runs that must agree bit for bit. Each batch is two
    of `images`, resized, and one of noise. Further noise images follow while there are experts that got no token.

    Returns, and writes into the manifest as `parity`, for each task: `worst_relative_error` (max |difference| /
    max |torch| of an image) and `worst_at` (size, batch, threads), number of `comparisons` of one image,
    `near_tie_images` and `near_tie_tokens` (see the module), and `experts_not_hit` {block index: experts that no
    token of these images went to: untested}. Raises RuntimeError if the error exceeds 1e-4, a result is not
    repeatable or not finite, or a size could not be compared because of near ties.
    """
    if images.ndim != 4 or images.shape[1] != 3 or not len(images):
        raise ValueError(f"images have shape {images.shape}: give [n, 3, H, W], n >= 1")
    package = Package.load(package_dir)  # hashes the files, once
    fixed = package.entry(package.tasks[0])["input_size"]
    sizes = [(fixed[0], fixed[1])] if fixed else _sizes(model)
    was_training = model.training
    model.eval()
    try:
        # Task by task: the sessions of all of them at once would hold the experts as many times over.
        records = {task: _check_task(model, package_dir, task, images, sizes) for task in package.tasks}
    finally:
        model.train(was_training)
    layers = list(model.backbone.moe_indices)
    report = {
        task: {
            "worst_relative_error": record.worst,
            "worst_at": record.where,
            "comparisons": record.compared,
            "near_tie_images": record.near_tie_images,
            "near_tie_tokens": record.near_tie_tokens,
            "experts_not_hit": record.not_hit(layers),
        }
        for task, record in records.items()
    }
    failures = [f"{task}: {failure}" for task, record in records.items() for failure in record.failures]
    _write(package_dir, report, sizes, failures)
    if failures:
        raise RuntimeError(
            f"the package {package_dir} does not compute what the model computes ({len(failures)} findings): "
            + "; ".join(failures[:5])
        )
    return report


def _check_task(
    model: MultiTaskModel, package_dir: Path, task: str, images: NDArray[np.float32], sizes: list[tuple[int, int]]
) -> _Record:
    """Run all batches of one task."""
    packages = [Package.load(package_dir, threads=threads, verify=False) for threads in THREADS]
    device = next(model.parameters()).device
    record = _Record()
    for batch in _batches(images, sizes, record):
        output = model(batch.to(device), [task])
        loads = [expert_load(routing.expert_ids_RNK, _num_experts(routing))[0].cpu() for routing in output.routings]
        old = record.loads or [torch.zeros_like(load) for load in loads]
        record.loads = [before + load for before, load in zip(old, loads, strict=True)]
        ties = _near_ties(output.routings, len(batch))
        _compare(packages, task, batch.numpy(), output.logits[task].cpu().numpy(), ties, record)
    return record


def _sizes(model: MultiTaskModel) -> list[tuple[int, int]]:
    """Return the trained size, a larger one, and a non-square one of odd numbers of patches, in pixels."""
    patch = model.backbone.patch_size
    height, width = model.config.image_size
    odd = (5, 3) if (height, width) == (3 * patch, 5 * patch) else (3, 5)
    return [(height, width), (height + patch, width + 2 * patch), (odd[0] * patch, odd[1] * patch)]


def _batches(images: NDArray[np.float32], sizes: list[tuple[int, int]], record: _Record) -> Iterator[Tensor]:
    """Yield a batch [3, 3, *size] of each size, then batches of noise while there are experts without a token."""
    generator = torch.Generator().manual_seed(0)
    source = torch.from_numpy(images).float()
    for number, size in enumerate(sizes):
        picks = [(2 * number + offset) % len(images) for offset in range(BATCH - 1)]
        resized = F.interpolate(source[picks], size=size, mode="bilinear", align_corners=False)
        yield torch.cat([resized, torch.randn(1, 3, *size, generator=generator)])
    for number in range(NOISE_ROUNDS):
        if all((load > 0).all() for load in record.loads):
            return
        # Stronger and weaker, coarser and finer: plain noise looks alike to most trained routers.
        (height, width), coarse = sizes[0], 1 + 3 * (number % 2)
        noise = torch.randn(BATCH, 3, -(-height // coarse), -(-width // coarse), generator=generator)
        tint = torch.randn(BATCH, 3, 1, 1, generator=generator)
        yield (F.interpolate(noise, size=(height, width), mode="nearest") + tint) * (0.5 + number / 2)


def _num_experts(routing: Routing) -> int:
    return routing.scores_RNE.shape[-1]


def _near_ties(routings: list[Routing], batch: int) -> NDArray[np.int64]:
    """Return how many near-tie tokens each image has, over the layers: [B]."""
    counts = np.zeros(batch, np.int64)
    for routing in routings:
        top_k = routing.weights_RNK.shape[-1]
        if top_k < _num_experts(routing):
            best = routing.scores_RNE[0].topk(top_k + 1, dim=-1).values
            near = (best[:, top_k - 1] - best[:, top_k]) < NEAR_TIE * best[:, top_k - 1]
            counts += near.view(batch, -1).sum(dim=1).cpu().numpy()
    return counts


def _compare(
    packages: list[Package],
    task: str,
    batch: NDArray[np.float32],
    expected: NDArray[np.float32],
    ties: NDArray[np.int64],
    record: _Record,
) -> None:
    """Run one batch, and its first image alone, with each number of threads, and add what is found to the record."""
    size = f"{batch.shape[2]}x{batch.shape[3]}"
    record.near_tie_tokens += int(ties.sum())
    sound = 0
    for package, threads in zip(packages, THREADS, strict=True):
        for count in (BATCH, 1):
            where = f"{size}, batch {count}, {threads} threads"
            results = [package.logits(batch[:count], task) for _ in range(REPEATS if count == 1 else 1)]
            if any(not np.array_equal(results[0], other) for other in results[1:]):
                record.failures.append(f"{where}: repeated runs differ")
            if not np.isfinite(results[0]).all():  # a NaN compares as neither above nor below the limit
                record.failures.append(f"{where}: not finite")
                continue
            for image in range(count):
                scale = max(float(np.abs(expected[image]).max()), 1e-30)
                error = float(np.abs(results[0][image] - expected[image]).max()) / scale
                if error > LIMIT and ties[image]:
                    record.near_tie_images += 1
                    continue
                sound += 1
                record.compared += 1
                if error > record.worst:
                    record.worst, record.where = error, where
                if error > LIMIT:
                    record.failures.append(f"{where}: relative error {error:.1e}, limit {LIMIT:.0e}")
    if not sound:
        record.failures.append(f"{size}: every image has router near ties and differs; use other images")


def _write(package_dir: Path, report: dict[str, Any], sizes: list[tuple[int, int]], failures: list[str]) -> None:
    """Record the check in the package's manifest."""
    manifest = read_json(package_dir / MANIFEST, "export the package first")
    manifest["parity"] = {
        "passed": not failures,
        "limit": LIMIT,
        "near_tie_gap": NEAR_TIE,
        "sizes": [list(size) for size in sizes],
        "batches": [BATCH, 1],
        "threads": list(THREADS),
        "repeats": REPEATS,
        "tasks": report,
    }
    write_json(package_dir / MANIFEST, manifest)
