"""Does a package compute what the model computes? Measured, with the answer written into the manifest.

Near ties: where the K-th and the next router score of a token are closer than rounding, torch and onnxruntime may
rightly pick different experts, and that token's output differs visibly. An image over the limit that has such a
token, in any layer, is counted as `near_tie_images` instead of failing; one without fails. Every image size needs
at least one image that is compared in earnest.

Where a graph leaves experts out or uses fewer of them, torch routes the same way for the comparison. Graphs in integers
differ from torch by design: they must be finite and repeatable, and how far they are is recorded.

Two extents: the quick check that every export runs, and the full one, over every image given, with a hunt for races
and with every expert reached.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
import onnx
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from onnx import numpy_helper
from torch import Tensor

from m3vit.digests import check_listed, read_sealed_json, write_sealed_json
from m3vit.export.onnx.package import budget_of
from m3vit.export.onnx.parity_record import LIMIT, Record
from m3vit.export.onnx.quantize import FLOAT
from m3vit.export.runtime.manifest import MANIFEST, package_digests
from m3vit.export.runtime.ort import onnxruntime, session_options
from m3vit.export.runtime.package import ALL, NotFinite, Package
from m3vit.models.budget import Budget
from m3vit.models.multitask import MultiTaskModel, Output
from m3vit.models.router import Routing

NEAR_TIE = 1e-5  # relative gap of router scores below which rounding may decide
THREADS = (1, 2)  # a race needs two
BATCH = 3
REPEATS = 3
NOISE_ROUNDS = 6
# A race of onnxruntime's ScatterND(add), which the graphs avoid, showed in one run of ten from about 1,000 tokens on.
RACE_TOKENS = 1024
RACE_REPEATS = 20
# Added to a router logit in turn, until the expert is chosen: a larger one costs the other logits' last bits.
FORCES = (20.0, 100.0, 500.0)


class ParityError(RuntimeError):
    """A package does not compute what its model computes; `findings` says where, on one line."""

    def __init__(self, package_dir: Path, failures: list[str]) -> None:
        self.findings = f"({len(failures)} findings): " + "; ".join(failures[:5])
        super().__init__(f"the package {package_dir} does not compute what the model computes {self.findings}")


class _Runner(Protocol):
    """What runs a graph: a Package, or a session whose routers are forced."""

    def logits(self, images: NDArray[Any], task: str) -> NDArray[np.float32]: ...


class _Batch(NamedTuple):
    """Images [b, 3, H, W] and how they are run: `repeats` times, and the first of them alone as often as said."""

    images: Tensor
    repeats: int = 1
    alone: int = 0


class _Check(NamedTuple):
    """What one task is checked with: images [3, H, W], at these sizes, all of them if `full`; `tick` counts batches.

    `budget`: of the package's graphs; torch keeps to the same. `named`: its name in the package, None of the default.
    """

    model: MultiTaskModel
    package_dir: Path
    task: str
    images: Sequence[NDArray[np.float32]]
    sizes: list[tuple[int, int]]
    full: bool
    tick: Callable[[], None]
    budget: Budget
    named: str | None = None

    def open(self, **options: Any) -> list[Package]:
        """Open the package once for each number of threads."""
        given = {"verify": False, "budget": self.named, **options}
        return [Package.load(self.package_dir, threads=threads, **given) for threads in THREADS]

    def race(self) -> "_Batch":
        """Return the batch that is repeated to find races."""
        return _race_batch(self.images, self.sizes[0], self.model.backbone.patch_size)

    def torch(self, batch: "_Batch", tasks: Sequence[str] = ()) -> Output:
        """Return what the model computes of the task, or of several."""
        images = batch.images.to(next(self.model.parameters()).device)
        return self.model(images, list(tasks or [self.task]), budget=self.budget)


@torch.no_grad()
def check_parity(
    model: MultiTaskModel,
    package_dir: Path,
    images: Sequence[NDArray[np.float32]],
    *,
    full: bool = False,
    sources: dict[str, int] | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> dict[str, dict[str, Any]]:
    """Compare a package with the model it was exported from, over images float32 [3, H, W], normalised; one or more.

    For each task: three image sizes (the trained one, a larger one, an odd non-square one; the fixed one alone if the
    graph has one), batches of 3 and 1, 1 and 2 threads, repeated runs that must agree bit for bit. Each batch is two
    of `images`, resized, and one of noise. Further noise images follow while there are experts that got no token.

    `full` adds: every one of `images` at every size; 20 repeats of a batch of 1,024 tokens or more; and, for experts
    that still got no token, a batch whose routers are forced to them, in the graph and in the model alike.

    `sources` says where the images are from, for the manifest; `progress` gets (batches done, batches in all).

    Returns, and writes into the manifest as `parity`, for each task: `worst_relative_error` (max |difference| /
    max |torch| of an image) and `worst_at` (size, batch, threads), `median_relative_error`, number of `comparisons`
    of one image, `near_tie_images` and `near_tie_tokens` (see the module), `experts_not_hit` {block index: experts
    that the task may use, and the graph holds, that no token went to: untested}, `experts_forced` (those that forced
    routers alone reached) and `integer_errors` {precision: worst relative error}. Of a package of several budgets all
    of this for each, as "TASK, budget NAME" for those beside the default. Raises ParityError if the error of a graph in
    floats exceeds 1e-4, a result is not repeatable or not finite, or a size could not be compared because of near ties.
    """
    if not len(images) or images[0].ndim != 3 or images[0].shape[0] != 3:
        raise ValueError(f"{len(images)} images: give one or more, each [3, H, W]")
    package = Package.load(package_dir, verify=False)  # an earlier finding must not keep it from being compared again
    check_listed(package_dir, package_digests(package.manifest), "export the package again")
    fixed = package.entry(package.tasks[0])["input_size"]
    sizes = [(fixed[0], fixed[1])] if fixed else _sizes(model)
    batches_per_task = len(sizes) + (len(sizes) * -(-len(images) // BATCH) + 1 if full else 0)
    done = 0

    def tick() -> None:
        nonlocal done
        done += 1
        if progress is not None:
            progress(done, batches_per_task * len(package.tasks) * max(1, len(package.budgets)))

    was_training = model.training
    model.eval()
    try:
        found: dict[str | None, dict[str, Record]] = {}
        names: list[str | None] = [*package.budgets] or [None]
        for named in names:
            # Task by task: the sessions of all of them at once would hold the experts as many times over.
            rest = (images, sizes, full, tick, budget_of(package.of(named).manifest), named)
            records = {task: _check_task(_Check(model, package_dir, task, *rest)) for task in package.tasks}
            if package.all_at_once:
                for precision in package.manifest["precisions"]:
                    _check_all_tasks(_Check(model, package_dir, ALL, *rest), precision, records)
            found[named] = records
    finally:
        model.train(was_training)
    first, layers = next(iter(found)), list(model.backbone.moe_indices)
    every = {
        task if named == first else f"{task}, budget {named}": record
        for named, records in found.items()
        for task, record in records.items()
    }
    report = {name: record.report(layers) for name, record in every.items()}
    failures = [f"{name}: {failure}" for name, record in every.items() for failure in record.all_failures()]
    extent = {
        "full": full,
        "images": len(images),
        "image_sources": sources or {},
        "race_hunt": {"tokens": RACE_TOKENS, "repeats": RACE_REPEATS} if full else None,
    }
    _write(package_dir, extent, report, sizes, failures)
    if failures:
        raise ParityError(package_dir, failures)
    return report


def _check_task(check: _Check) -> Record:
    """Run all batches of one task."""
    model = check.model
    entry = Package.load(check.package_dir, verify=False, budget=check.named).entry(check.task)
    budgets, record = check.budget.layers(check.task, model.backbone.moe_indices), Record()
    record.kept = [_mask(model, budget.kept) for budget in budgets]
    if FLOAT in entry["graphs"]:
        _check_floats(check, record)
    for precision in entry["graphs"]:
        if precision != FLOAT:
            _check_integers(check, precision, record)
    return record


def _mask(model: MultiTaskModel, kept: Sequence[int] | None) -> Tensor:
    mask = torch.zeros(model.config.num_experts, dtype=torch.bool)
    mask[list(range(len(mask)) if kept is None else kept)] = True
    return mask


def _check_floats(check: _Check, record: Record) -> None:
    """Compare the graph in floats, within the limit; where there is one backbone for all tasks, it too."""
    task, size = check.task, check.sizes[0]
    packages = check.open(precision=FLOAT)
    planned = [_quick_batches(check.images, check.sizes)]
    planned += [_every_image(check.images, check.sizes), iter([check.race()])] if check.full else []
    for batches in planned:
        for batch in batches:
            _run(check, packages, batch, record)
            check.tick()
    for batch in _noise_batches(size, record):
        _run(check, packages, batch, record)
    manifest, graph = packages[0].manifest, check.package_dir / packages[0].entry(task)["graphs"][FLOAT]["file"]
    packages.clear()  # their sessions are as large as those that follow
    if manifest["backbone"]:
        shared = check.open(precision=FLOAT, one_backbone=True)
        for batch in _quick_batches(check.images, check.sizes):
            _run(check, shared, batch, record)
        shared.clear()
    if check.full:
        _force(check, graph, record)


def _check_integers(check: _Check, precision: str, record: Record) -> None:
    """Run the graph in integers; what it must be is finite and repeatable."""
    packages = check.open(precision=precision)
    found, batches = Record(), list(_quick_batches(check.images, check.sizes))
    batches += [check.race()] if check.full else []
    for batch in batches:
        expected = check.torch(batch).logits[check.task].cpu().numpy()
        _compare(packages, check.task, batch, expected, np.zeros(len(batch.images), np.int64), found, limit=math.inf)
    record.integers[precision] = found.worst
    record.failures += [f"{precision}: {failure}" for failure in found.failures]


def _check_all_tasks(check: _Check, precision: str, records: dict[str, Record]) -> None:
    """Compare the graph of all tasks at once: as each task's own graph is, one in integers within no limit."""
    packages, limit = check.open(precision=precision), LIMIT if precision == FLOAT else math.inf
    found = records if precision == FLOAT else {task: Record() for task in records}
    batches = list(_quick_batches(check.images, check.sizes))
    for batch in [*batches, check.race()] if check.full else batches:
        images = batch.images.numpy()
        size = f"{images.shape[2]}x{images.shape[3]}"
        output = check.torch(batch, list(records))
        for package, threads in zip(packages, THREADS, strict=True):
            for count in (len(images), 1):
                where = f"all tasks at once, {size}, batch {count}, {threads} threads"
                try:
                    results = package.logits_all(images[:count])
                    again = [package.logits_all(images[:count]) for _ in range(max(1, batch.repeats - 1))]
                except NotFinite as error:
                    found[error.task].failures.append(f"{where}: not finite")
                    continue
                for place, (task, record) in enumerate(found.items()):
                    routings = [routing.of_task(place) for routing in output.routings]
                    ties = _near_ties(routings, len(images), records[task].kept)
                    record.sound.setdefault(size, 0)
                    if any(results[task].tobytes() != other[task].tobytes() for other in again):
                        record.failures.append(f"{where}: repeated runs differ")
                    record.judge(results[task], output.logits[task].cpu().numpy(), ties, size, where, limit)
    if precision != FLOAT:
        for task, record in found.items():
            records[task].integers[f"{precision}, all tasks at once"] = record.worst
            records[task].failures += [f"{precision}: {failure}" for failure in record.failures]


def _run(check: _Check, runners: Sequence[_Runner], batch: _Batch, record: Record) -> None:
    """Run one batch through the model and the graph, and add what is found to the record."""
    output = check.torch(batch)
    record.count(output.routings)
    ties = _near_ties(output.routings, len(batch.images), record.kept)
    _compare(runners, check.task, batch, output.logits[check.task].cpu().numpy(), ties, record)


def _sizes(model: MultiTaskModel) -> list[tuple[int, int]]:
    """Return the trained size, a larger one, and a non-square one of odd numbers of patches, in pixels."""
    patch = model.backbone.patch_size
    height, width = model.config.image_size
    odd = (5, 3) if (height, width) == (3 * patch, 5 * patch) else (3, 5)
    return [(height, width), (height + patch, width + 2 * patch), (odd[0] * patch, odd[1] * patch)]


def _picked(images: Sequence[NDArray[np.float32]], picks: Sequence[int], size: tuple[int, int]) -> Tensor:
    """Return some of the images, resized: [n, 3, *size]. A number past the last starts over."""
    batch = torch.stack([torch.from_numpy(np.asarray(images[pick % len(images)])).float() for pick in picks])
    return F.interpolate(batch, size=size, mode="bilinear", align_corners=False)


def _quick_batches(images: Sequence[NDArray[np.float32]], sizes: list[tuple[int, int]]) -> Iterator[_Batch]:
    """Yield a batch of each size: two images and one of noise."""
    generator = torch.Generator().manual_seed(0)
    for number, size in enumerate(sizes):
        picks = [2 * number + offset for offset in range(BATCH - 1)]
        noise = torch.randn(1, 3, *size, generator=generator)
        yield _Batch(torch.cat([_picked(images, picks, size), noise]), alone=REPEATS)


def _every_image(images: Sequence[NDArray[np.float32]], sizes: list[tuple[int, int]]) -> Iterator[_Batch]:
    """Yield every image at every size, in batches of 3 and a rest."""
    for size in sizes:
        for first in range(0, len(images), BATCH):
            yield _Batch(_picked(images, range(first, min(first + BATCH, len(images))), size))


def _race_batch(images: Sequence[NDArray[np.float32]], size: tuple[int, int], patch: int) -> _Batch:
    """Return a batch of so many images that the experts get RACE_TOKENS tokens or more."""
    count = -(-RACE_TOKENS // (size[0] // patch * (size[1] // patch)))
    return _Batch(_picked(images, range(count), size), repeats=RACE_REPEATS)


def _noise_batches(size: tuple[int, int], record: Record) -> Iterator[_Batch]:
    """Yield batches of noise while there are experts without a token."""
    generator = torch.Generator().manual_seed(1)
    for number in range(NOISE_ROUNDS):
        if not any(missing.any() for missing in record.not_hit()):
            return
        # Stronger and weaker, coarser and finer: plain noise looks alike to most trained routers.
        (height, width), coarse = size, 1 + 3 * (number % 2)
        noise = torch.randn(BATCH, 3, -(-height // coarse), -(-width // coarse), generator=generator)
        tint = torch.randn(BATCH, 3, 1, 1, generator=generator)
        images = (F.interpolate(noise, size=(height, width), mode="nearest") + tint) * (0.5 + number / 2)
        yield _Batch(images, alone=REPEATS)


def _force(check: _Check, graph: Path, record: Record) -> None:
    """Run noise through the experts that no token went to, by a bias on their router logits, K of a layer at a time.

    The graph's file stays as it is: onnxruntime takes the changed biases instead of the ones stored.
    """
    before = record.not_hit()
    generator = torch.Generator().manual_seed(2)
    backbone = check.model.backbone
    routers = [backbone.trunk.blocks[index].mlp.router for index in backbone.moe_indices]
    budgets = check.budget.layers(check.task, backbone.moe_indices)
    top_k = min((budget.top_k or check.model.config.top_k for budget in budgets), default=0)
    for strength in FORCES:
        untried = record.not_hit()
        while any(mask.any() for mask in untried):
            tried = [mask & (mask.cumsum(0) <= top_k) for mask in untried]
            forces = [mask.float() * strength for mask in tried]
            batch = _Batch(torch.randn(BATCH, 3, *check.sizes[0], generator=generator))
            runners = [_ForcedSession(graph, [force.numpy() for force in forces], threads) for threads in THREADS]
            with _forced_routers(routers, forces):
                _run(check, runners, batch, record)
            untried = [mask & ~done for mask, done in zip(untried, tried, strict=True)]
    record.forced = [was & ~now for was, now in zip(before, record.not_hit(), strict=True)]


@contextmanager
def _forced_routers(routers: list[Any], forces: list[Tensor]) -> Iterator[None]:
    """Add a bias [E] to the logits of each router of the model."""

    def forced(gate: Callable[[int], tuple[Tensor, Tensor]], force: Tensor) -> Callable[[int], tuple[Tensor, Tensor]]:
        def with_force(task_id: int) -> tuple[Tensor, Tensor]:
            weight, bias = gate(task_id)
            return weight, bias + force.to(bias.device)

        return with_force

    try:
        for router, force in zip(routers, forces, strict=True):
            router.gate = forced(router.gate, force)
        yield
    finally:
        for router in routers:
            router.__dict__.pop("gate", None)


class _ForcedSession:
    """A graph whose router biases are raised by `forces`, [E] for each MoE layer."""

    def __init__(self, graph: Path, forces: list[NDArray[np.float32]], threads: int) -> None:
        initializers = onnx.load(graph, load_external_data=False).graph.initializer
        biases = [tensor for tensor in initializers if tensor.name.endswith(".router.bias")]
        assert len(biases) == len(forces), f"{len(biases)} router biases in {graph.name}, {len(forces)} MoE layers"
        options = session_options(threads)
        # Kept alive: onnxruntime reads them where they are.
        self.values = [
            onnxruntime.OrtValue.ortvalue_from_numpy(numpy_helper.to_array(tensor, str(graph.parent)) + force)
            for tensor, force in zip(biases, forces, strict=True)
        ]
        for tensor, value in zip(biases, self.values, strict=True):
            options.add_initializer(tensor.name, value)
        self.session = onnxruntime.InferenceSession(str(graph), options, providers=["CPUExecutionProvider"])

    def logits(self, images: NDArray[Any], task: str) -> NDArray[np.float32]:
        # A static graph takes one image at a time.
        step = 1 if self.session.get_inputs()[0].shape[0] == 1 else len(images)
        parts = [images[start : start + step] for start in range(0, len(images), step)]
        return np.concatenate([np.asarray(self.session.run([task], {"image": part})[0]) for part in parts])


def _near_ties(routings: list[Routing], batch: int, kept: Sequence[Tensor] = ()) -> NDArray[np.int64]:
    """Return how many near-tie tokens each image has, over the layers: [B]. `kept` (bool [E]): of these experts."""
    counts = np.zeros(batch, np.int64)
    for number, routing in enumerate(routings):
        top_k, scores = routing.weights_RNK.shape[-1], routing.scores_RNE[0]
        scores = scores[:, kept[number].to(scores.device)] if kept else scores
        if top_k < scores.shape[-1]:
            best = scores.topk(top_k + 1, dim=-1).values
            near = (best[:, top_k - 1] - best[:, top_k]) < NEAR_TIE * best[:, top_k - 1]
            counts += near.view(batch, -1).sum(dim=1).cpu().numpy()
    return counts


def _compare(
    runners: Sequence[_Runner],
    task: str,
    batch: _Batch,
    expected: NDArray[np.float32],
    ties: NDArray[np.int64],
    record: Record,
    limit: float = LIMIT,
) -> None:
    """Run one batch, and its first image alone, with each number of threads, and add what is found to the record."""
    images = batch.images.numpy()
    size = f"{images.shape[2]}x{images.shape[3]}"
    record.near_tie_tokens += int(ties.sum())
    record.sound.setdefault(size, 0)
    for runner, threads in zip(runners, THREADS, strict=True):
        for count, repeats in ((len(images), batch.repeats), (1, batch.alone)):
            if not repeats:
                continue
            where = f"{size}, batch {count}, {threads} threads"
            try:
                result = runner.logits(images[:count], task)
                # Bit for bit, with NaN equal to itself: that is found below.
                if any(runner.logits(images[:count], task).tobytes() != result.tobytes() for _ in range(repeats - 1)):
                    record.failures.append(f"{where}: repeated runs differ")
            except NotFinite:
                result = np.full(1, np.nan, np.float32)
            record.judge(result, expected, ties, size, where, limit)


def _write(
    package_dir: Path,
    extent: dict[str, Any],
    report: dict[str, Any],
    sizes: list[tuple[int, int]],
    failures: list[str],
) -> None:
    """Record the check in the package's manifest."""
    manifest = read_sealed_json(package_dir / MANIFEST, "export the package first")
    manifest["parity"] = {
        "passed": not failures,
        **extent,
        "limit": LIMIT,
        "near_tie_gap": NEAR_TIE,
        "sizes": [list(size) for size in sizes],
        "batches": [BATCH, 1],
        "threads": list(THREADS),
        "repeats": REPEATS,
        "tasks": report,
    }
    write_sealed_json(package_dir / MANIFEST, manifest)
