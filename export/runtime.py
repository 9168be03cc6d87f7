"""Run an exported package: onnxruntime, numpy and pillow; no torch.

Shapes: B images, C channels, H x W pixels.
"""

import ctypes
import hashlib
import math
import os
import platform
import threading
import warnings
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
from numpy.typing import NDArray
from PIL import Image

from m3vit.errors import InputError
from m3vit.export.decoding import CHANNELS, DECODERS, decode, unit
from m3vit.export.drawing import colourise as colourise
from m3vit.export.drawing import paint as paint
from m3vit.files import atomic_folder, read_json, require_new, sha256_file
from m3vit.pointers import check_no_link

FORMAT, FORMAT_VERSION, MANIFEST = "m3vit-onnx", 2, "manifest.json"
MAX_PATCHES = 8192  # of one image; memory grows with their square (a score matrix of 256 MiB for each head)
SMALL_MACS = 10**9  # multiply-accumulates of an image; below, there is little work to share between threads
SATURATES = (
    "this processor has no VNNI instructions: 8-bit products may saturate, and predictions of an int8 package lose "
    "accuracy; score it here (m3vit eval), or use --precision fp32"
)
_NO_PACKAGE = "give the folder that `m3vit export onnx` wrote"


class Package:
    """The graphs of a package, by task. A graph is loaded when it is first used; all share one weights file.

    `folder` is where it is, `manifest` the content of its manifest.json, `precision` the one of its graphs in use.
    """

    def __init__(self, folder: Path, manifest: dict[str, Any], precision: str, sessions: "_Sessions") -> None:
        self.folder, self.manifest, self.precision = folder, manifest, precision
        self._sessions = sessions
        self._one_backbone = False

    @classmethod
    def load(
        cls,
        folder: Path | str,
        *,
        precision: str | None = None,
        threads: int | None = None,
        low_memory: bool = False,
        one_backbone: bool = False,
        cache: Path | str | None = None,
        verify: bool = True,
    ) -> "Package":
        """Open a package.

        Args:
            folder: what `m3vit export onnx` wrote.
            precision: which of the package's precisions to run, such as int8; default: its first.
            threads: of onnxruntime, for each graph. None chooses by the size of the model, 0 takes one a core.
            low_memory: leave weights where they are, mapped from the file and shared by all tasks and processes,
                instead of laying them out anew for each graph; slower.
            one_backbone: run all tasks through one graph that takes the task as an input, and a small one for each
                head; the package must have been exported with it. Weights are in memory once, whatever the tasks.
            cache: a folder for graphs with weights laid out for this processor. Made when a graph is first used, and
                again if the package, the processor or onnxruntime changed; afterwards, loading is faster and takes
                less memory of its own.
            verify: compare every file's sha256 with the manifest.

        Raises InputError for a missing or damaged manifest or file, and for what the package does not hold.
        """
        folder = Path(folder)
        if threads is not None and threads < 0:
            raise InputError(f"threads is {threads}: give 1 or more, 0 for one a core, or none to choose by the model")
        if low_memory and cache is not None:
            raise InputError("low_memory leaves weights as they are, a cache lays them out: choose one of the two")
        manifest = read_json(folder / MANIFEST, _NO_PACKAGE)
        entries = _check_manifest(folder / MANIFEST, manifest)
        check_no_link(folder / manifest["weights"]["file"], "the package's")
        precision = precision or manifest["precisions"][0]
        if precision not in manifest["precisions"]:
            raise InputError(
                f"{folder} holds {', '.join(manifest['precisions'])}, not {precision}: choose one of these, or export "
                f"it with --precision {precision}"
            )
        if one_backbone and not manifest["backbone"]:
            raise InputError(f"{folder} has no graph of the backbone alone: export it with --one-backbone")
        for entry in entries if verify else []:
            path = folder / entry["file"]
            if not path.is_file():
                raise InputError(f"{path} not found: the package is incomplete; export it again")
            actual = sha256_file(path)
            if actual != entry["sha256"]:
                raise InputError(
                    f"{entry['file']} does not match {MANIFEST} (sha256 {actual[:12]}, not {entry['sha256'][:12]}): "
                    "the package was changed or damaged; export it again"
                )
        if precision != "fp32" and integers_saturate():
            warnings.warn(SATURATES, stacklevel=2)
        if threads is None:
            threads = default_threads(manifest)
        sessions = _Sessions(folder, threads, low_memory, cache, manifest["weights"]["sha256"])
        package = cls(folder, manifest, precision, sessions)
        package._one_backbone = one_backbone
        return package

    @property
    def tasks(self) -> list[str]:
        """The names of the package's tasks."""
        return list(self.manifest["tasks"])

    def entry(self, task: str) -> dict[str, Any]:
        """Return what the manifest says about a task, or raise InputError."""
        if task not in self.manifest["tasks"]:
            raise InputError(f"this package has no task {task!r}: it has {', '.join(self.tasks)}")
        return dict(self.manifest["tasks"][task])

    def session(self, task: str) -> onnxruntime.InferenceSession:
        """Return the onnxruntime session of a task's graph; input `image`, output named like the task."""
        entry = self.entry(task)
        return self._sessions.get(entry["graphs"][self.precision], ("image",), task, entry["channels"])

    def normalise(self, images: NDArray[np.uint8]) -> NDArray[np.float32]:
        """Turn RGB images uint8 [B, H, W, 3] into the graphs' input float32 [B, 3, H, W]."""
        image = self.manifest["image"]
        scaled = images.astype(np.float32) / np.float32(255)
        normal = (scaled - np.float32(image["mean"])) / np.float32(image["std"])
        return np.ascontiguousarray(normal.transpose(0, 3, 1, 2))

    def logits(self, images: NDArray[Any], task: str) -> NDArray[np.float32]:
        """Return the logits float32 [B, C, H, W] of a task, at the images' size.

        `images` are RGB uint8 [B, H, W, 3], or already normalised float32 [B, 3, H, W]. Raises InputError for
        another shape or type, and for a size that the graph does not take (`predict` resizes).
        """
        if images.ndim != 4 or images.shape[0] == 0:
            raise InputError(f"images have shape {images.shape}: give [B, H, W, 3] uint8 or [B, 3, H, W] float32")
        if images.dtype == np.uint8 and images.shape[3] == 3:
            images = self.normalise(images)
        elif images.dtype != np.float32 or images.shape[1] != 3:
            raise InputError(
                f"images are {images.dtype} {images.shape}: give uint8 [B, H, W, 3], or float32 [B, 3, H, W] normalised"
            )
        height, width = images.shape[2:]
        if (target := self._graph_size(task, height, width)) != (height, width):
            raise InputError(
                f"{task} cannot run on {height}x{width} images: resize them to {target[0]}x{target[1]}, "
                "or predict one at a time"
            )
        if self.entry(task)["batch"] and len(images) > 1:
            return np.concatenate([self._run(images[place : place + 1], task) for place in range(len(images))])
        return self._run(images, task)

    def _run(self, images: NDArray[np.float32], task: str) -> NDArray[np.float32]:
        """Run a task's graph, or the backbone and the task's head, on normalised images that it takes."""
        entry, run = self.entry(task), self._sessions.run
        if not self._one_backbone:
            return run(entry["graphs"][self.precision], {"image": images}, task, entry["channels"])
        inputs = {"image": images, "task": np.array([entry["number"]])}
        features = run(self.manifest["backbone"]["graphs"][self.precision], inputs, "features")
        return run(entry["heads"][self.precision], {"features": features}, task, entry["channels"])

    def predict(self, image: NDArray[np.uint8], task: str, *, resize: bool = False) -> NDArray[Any]:
        """Return a task's prediction for one RGB image uint8 [H, W, 3], at the image's own size.

        semseg: class ids uint8 [H, W]. depth: metres float32 [H, W]. normals: unit vectors float32 [H, W, 3],
        x right, y up, z towards the camera. edge: probability float32 [H, W].

        A graph of dynamic size takes every image of at least one patch; where the patch size does not divide the
        image, the nearest size that it does divide is used, and the result resized back. With `resize` the image is
        taken at the size the graph is fixed to, or, if dynamic, the size the model was trained at: less memory for
        large photographs. Raises InputError for an image of another type or shape, an unknown task, and, without
        `resize`, for an image that is too small, too large (MAX_PATCHES) or not of the graph's fixed size.
        """
        if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3 or image.size == 0:
            raise InputError(f"image is {image.dtype} {image.shape}: give uint8 [H, W, 3], RGB")
        prediction: NDArray[Any] = self.predict_batch(image[None], task, resize=resize)[0]
        return prediction

    def predict_batch(self, images: NDArray[np.uint8], task: str, *, resize: bool = False) -> NDArray[Any]:
        """As `predict`, for images of one size, uint8 [B, H, W, 3]; returns [B, H, W] or [B, H, W, 3].

        Batches of which an onnxruntime run would need too much memory (MAX_PATCHES in all) are run in parts.
        """
        if images.dtype != np.uint8 or images.ndim != 4 or images.shape[3] != 3 or images.size == 0:
            raise InputError(f"images are {images.dtype} {images.shape}: give uint8 [B, H, W, 3], RGB")
        height, width = images.shape[1:3]
        entry = self.entry(task)
        target = self._target(task, height, width, resize)
        patch = entry["patch_multiple"]
        at_once = max(1, MAX_PATCHES // ((target[0] // patch) * (target[1] // patch)))
        if target != (height, width):
            images = np.stack([_resized_image(image, target) for image in images])
        parts = [images[start : start + at_once] for start in range(0, len(images), at_once)]
        decoded = np.concatenate([decode(self.logits(part, task), entry["decode"]) for part in parts])
        if target == (height, width):
            return decoded
        return np.stack([_resized(one, (height, width), entry["decode"]) for one in decoded])

    def predict_iter(
        self, images: Iterable[NDArray[np.uint8]], task: str, *, resize: bool = False
    ) -> Iterator[NDArray[Any]]:
        """Yield the prediction of each image as it comes: for streams, and sets that do not fit in memory."""
        return (self.predict(image, task, resize=resize) for image in images)

    def _target(self, task: str, height: int, width: int, resize: bool) -> tuple[int, int]:
        """Return the size (height, width) to run an image at, or raise InputError as `predict` says."""
        entry = self.entry(task)
        fixed, patch = entry["input_size"], entry["patch_multiple"]
        if resize:
            chosen = fixed or self.manifest["image"]["train_size"]
            return chosen[0], chosen[1]
        if fixed and tuple(fixed) != (height, width):
            raise InputError(
                f"the image is {height}x{width} (height x width) and {task} was exported for {fixed[0]}x{fixed[1]} "
                "only: give such images, allow resizing, or export without a fixed size"
            )
        if min(height, width) < patch:
            raise InputError(f"the image is {height}x{width} (height x width): {task} needs at least {patch}x{patch}")
        target = self._graph_size(task, height, width)
        patches = (target[0] // patch) * (target[1] // patch)
        if patches > MAX_PATCHES and not fixed:
            raise InputError(
                f"the image is {height}x{width} (height x width), {patches} patches of {patch}x{patch}: attention over "
                f"more than {MAX_PATCHES} takes gigabytes; allow resizing (--resize), or give a smaller image"
            )
        return target

    def _graph_size(self, task: str, height: int, width: int) -> tuple[int, int]:
        """Return the size (height, width) nearest to the given one that the task's graph takes."""
        entry = self.entry(task)
        if entry["input_size"]:
            return entry["input_size"][0], entry["input_size"][1]
        patch = entry["patch_multiple"]
        return max(patch, round(height / patch) * patch), max(patch, round(width / patch) * patch)


class _Sessions:
    """The onnxruntime sessions of a package's graphs, made when they are first asked for."""

    def __init__(
        self, folder: Path, threads: int, low_memory: bool, cache: Path | str | None, weights_sha256: str
    ) -> None:
        self.folder, self.threads, self.low_memory = folder, threads, low_memory
        self.weights_sha256 = weights_sha256
        self.cache = None if cache is None else Path(cache)
        self.sessions: dict[str, onnxruntime.InferenceSession] = {}
        self.shapes: dict[str, list[tuple[int, ...]]] = {}  # of the inputs of each session's last run
        self.lock = threading.Lock()  # a service's threads ask for the same session at once

    def run(
        self, entry: dict[str, Any], inputs: dict[str, NDArray[Any]], output: str, channels: int | None = None
    ) -> NDArray[np.float32]:
        """Run one graph, by its entry in the manifest; `output` and `channels` as in `get`.

        After a run of another size than the last, onnxruntime gives its memory back: it would keep what every size
        needed, and images of many sizes take gigabytes in the end. Not after every run: at one size, giving back and
        taking again costs up to half of the time.
        """
        session = self.get(entry, tuple(inputs), output, channels)
        shapes = [value.shape for value in inputs.values()]
        last, self.shapes[entry["file"]] = self.shapes.get(entry["file"], shapes), shapes
        options = None
        if last != shapes and not self.low_memory:  # which keeps nothing anyway
            options = onnxruntime.RunOptions()
            options.add_run_config_entry("memory.enable_memory_arena_shrinkage", "cpu:0")
        (result,) = session.run([output], inputs, options)
        return np.asarray(result, dtype=np.float32)

    def get(
        self, entry: dict[str, Any], inputs: tuple[str, ...], output: str, channels: int | None = None
    ) -> onnxruntime.InferenceSession:
        """Return the session of one graph, by its entry in the manifest, or raise InputError if it is another's graph.

        `inputs` and `output` are the names it must have, `channels` those of its output.
        """
        with self.lock:
            if entry["file"] not in self.sessions:
                self.sessions[entry["file"]] = self._make(entry, inputs, output, channels)
            return self.sessions[entry["file"]]

    def _make(
        self, entry: dict[str, Any], inputs: tuple[str, ...], output: str, channels: int | None
    ) -> onnxruntime.InferenceSession:
        path = self.folder / entry["file"]
        try:
            session = self._cached(entry) if self.cache is not None else self._create(path)
        except (InputError, OSError):
            raise
        except Exception as error:  # onnxruntime's exceptions share no base class
            reason = str(error).splitlines()[0]
            raise InputError(f"onnxruntime cannot load {path}: {reason}; export the package again") from error
        found, results = tuple(one.name for one in session.get_inputs()), session.get_outputs()
        width = results[0].shape[1] if results else None
        fits = channels is None or not isinstance(width, int) or width == channels
        if found != inputs or [one.name for one in results] != [output] or not fits:
            raise InputError(f"{path} is not the graph that {MANIFEST} describes: export the package again")
        return session

    def _options(self) -> onnxruntime.SessionOptions:
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = self.threads
        options.inter_op_num_threads = 1
        options.enable_mem_pattern = False  # it keeps a plan for every size it met
        # Threads of a session that is not running would go on waiting at full speed, and take the cores from the next
        # task's (on two cores, a switch took nearly as long again as the run).
        options.add_session_config_entry("session.force_spinning_stop", "1")
        options.log_severity_level = 3  # errors; what it warns about is its own memory planning
        if self.low_memory:
            options.add_session_config_entry("session.disable_prepacking", "1")
            # Each session would keep the memory of its largest run for itself.
            options.enable_cpu_mem_arena = False
        return options

    def _create(self, path: Path, options: onnxruntime.SessionOptions | None = None) -> onnxruntime.InferenceSession:
        return onnxruntime.InferenceSession(str(path), options or self._options(), providers=["CPUExecutionProvider"])

    def _cached(self, entry: dict[str, Any]) -> onnxruntime.InferenceSession:
        """Return a session whose graph was optimised and whose weights were laid out before, on a machine like this."""
        assert self.cache is not None
        key = hashlib.sha256(f"{entry['sha256']} {self.weights_sha256} {machine()}".encode())
        home = self.cache / f"{Path(entry['file']).stem}-{key.hexdigest()[:16]}"
        if not (home / "graph.onnx").is_file():
            require_new(home)
            with atomic_folder(home) as folder:
                options = self._options()
                options.optimized_model_filepath = str(folder / "graph.onnx")
                for name, value in (
                    ("save_external_prepacked_constant_initializers", "1"),
                    ("optimized_model_external_initializers_file_name", "weights.bin"),
                    ("optimized_model_external_initializers_min_size_in_bytes", "1024"),
                ):
                    options.add_session_config_entry(f"session.{name}", value)
                self._create(self.folder / entry["file"], options)
        options = self._options()
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
        return self._create(home / "graph.onnx", options)


def machine() -> str:
    """Return what a cache is made for: the processor, its instructions, and onnxruntime's version."""
    features = sorted(_cpu_flags())
    return f"{platform.system()} {platform.machine()} onnxruntime {onnxruntime.__version__} {' '.join(features)}"


def integers_saturate() -> bool:
    """Return whether 8-bit products may saturate here: x86 processors without VNNI add pairs of them in 16 bits."""
    flags = _cpu_flags()
    return "avx2" in flags and not any("vnni" in flag or flag == "amx_int8" for flag in flags)


def _cpu_flags() -> set[str]:
    """Return the processor's features as Linux names them; nothing elsewhere."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return set()
    return next(
        (set(line.partition(":")[2].split()) for line in lines if line.startswith(("flags", "Features"))), set()
    )


def give_memory_back() -> None:
    """Have glibc map every block of 1 MiB or more by itself, so that freeing it returns it to the system.

    By default that threshold grows to 32 MiB with what is freed, and the heaps of the threads keep what lies below it:
    with images of many sizes the resident memory of a service wandered between 190 and 310 MiB, and now stays at 127.
    It holds for the whole process, so `Package` leaves it to its user; call it before loading. Elsewhere than on glibc
    it does nothing.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError, TypeError):  # another C library
        return
    mallopt(-3, 1 << 20)  # M_MMAP_THRESHOLD


def default_threads(manifest: dict[str, Any]) -> int:
    """Return the threads to use for a package: all cores (0), but at most two for small models.

    A model of 0.05 billion multiply-accumulates still took 0.8 of the time on two threads; more were not measured.
    """
    return min(2, os.cpu_count() or 1) if manifest["macs"] < SMALL_MACS else 0


def file_entries(manifest: Any) -> list[dict[str, Any]]:
    """Return the entries of a manifest that name a file, wherever they are in it."""
    if not isinstance(manifest, dict):
        return []
    found = [manifest] if isinstance(manifest.get("file"), str) else []
    return found + [entry for value in manifest.values() for entry in file_entries(value)]


def _check_manifest(path: Path, manifest: Any) -> list[dict[str, Any]]:
    """Return the manifest's entries of files, or raise InputError if it lacks anything that this module reads."""
    if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
        raise InputError(f"{path} is not an m3vit package's: {_NO_PACKAGE}")
    version = manifest.get("format_version")
    if version != FORMAT_VERSION:
        raise InputError(f"{path} has format version {version}, this m3vit reads {FORMAT_VERSION}: export it again")
    try:
        image, tasks, precisions = manifest["image"], manifest["tasks"], manifest["precisions"]
        entries = file_entries({**manifest, "run": None})
        complete = _numbers(image["mean"], 3) and _numbers(image["std"], 3) and min(image["std"]) > 0
        complete &= _size(image["train_size"]) and bool(tasks)
        complete &= bool(precisions) and isinstance(manifest["weights"]["file"], str) and manifest["macs"] >= 0
        for entry in entries:
            # A plain name: a manifest from a stranger must not make us read files elsewhere.
            complete &= Path(entry["file"]).name == entry["file"] and isinstance(entry["sha256"], str)
        backbone = manifest["backbone"]
        for entry in tasks.values():
            kind, channels = entry["decode"], entry["channels"]
            complete &= kind in DECODERS and isinstance(channels, int) and CHANNELS.get(kind, channels) == channels
            complete &= _size([entry["patch_multiple"]] * 2)
            complete &= entry["input_size"] is None or _size(entry["input_size"])
            complete &= entry["batch"] in (None, 1)
            complete &= kind != "argmax" or len(entry["palette"]) == channels > 0
            for graphs in [entry["graphs"]] + ([entry["heads"], backbone["graphs"]] if backbone else []):
                complete &= not backbone or isinstance(entry["number"], int)
                complete &= all(isinstance(graphs[precision]["file"], str) for precision in precisions)
    except (KeyError, TypeError, AttributeError, ValueError, RecursionError):
        complete = False
    if not complete:
        raise InputError(f"{path} is damaged, entries are missing or of the wrong kind: export the package again")
    return entries


def _numbers(values: Any, count: int) -> bool:
    """Return whether `values` are so many finite numbers."""
    return len(values) == count and all(isinstance(v, int | float) and math.isfinite(v) for v in values)


def _size(values: Any) -> bool:
    """Return whether `values` are two positive whole numbers."""
    return len(values) == 2 and all(isinstance(value, int) and value > 0 for value in values)


def _resized_image(image: NDArray[np.uint8], size: tuple[int, int]) -> NDArray[np.uint8]:
    return np.asarray(Image.fromarray(image).resize(size[::-1], Image.Resampling.BILINEAR))


def _resized(array: NDArray[Any], size: tuple[int, int], kind: str) -> NDArray[Any]:
    """Resize a prediction [h, w] or [h, w, 3] to `size` (height, width): ids by nearest, values bilinearly."""
    shape = size[::-1]
    if kind == "argmax":
        return np.asarray(Image.fromarray(array).resize(shape, Image.Resampling.NEAREST))
    if array.ndim == 2:
        return np.asarray(Image.fromarray(array).resize(shape, Image.Resampling.BILINEAR))
    channels = [_resized(np.ascontiguousarray(array[..., axis]), size, "identity") for axis in range(3)]
    return unit(np.stack(channels, axis=-1))
