"""Run an exported package: onnxruntime, numpy and pillow; no torch.

Shapes: B images, C channels, H x W pixels.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
from numpy.typing import NDArray
from PIL import Image

from m3vit.errors import InputError
from m3vit.export.drawing import colourise as colourise
from m3vit.export.drawing import paint as paint
from m3vit.files import read_json, sha256_file

FORMAT, FORMAT_VERSION, MANIFEST = "m3vit-onnx", 1, "manifest.json"
MAX_PATCHES = 8192  # of one image; memory grows with their square (a score matrix of 256 MiB for each head)
_NO_PACKAGE = "give the folder that `m3vit export onnx` wrote"


class Package:
    """The graphs of a package, by task. A graph is loaded when it is first used; all share one weights file.

    `folder` is where it is, `manifest` the content of its manifest.json.
    """

    def __init__(self, folder: Path, manifest: dict[str, Any], threads: int) -> None:
        self.folder, self.manifest, self.threads = folder, manifest, threads
        self._sessions: dict[str, onnxruntime.InferenceSession] = {}
        self._shapes: dict[str, tuple[int, ...]] = {}  # of each session's last run

    @classmethod
    def load(cls, folder: Path | str, *, threads: int = 0, verify: bool = True) -> "Package":
        """Open a package. `threads` of onnxruntime per graph, 0 for one a core; `verify` hashes every file.

        Raises InputError for a missing or damaged manifest or file.
        """
        folder = Path(folder)
        if threads < 0:
            raise InputError(f"threads is {threads}: give 1 or more, or 0 for one a core")
        manifest = read_json(folder / MANIFEST, _NO_PACKAGE)
        entries = _check_manifest(folder / MANIFEST, manifest)
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
        return cls(folder, manifest, threads)

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
        """Return the task's onnxruntime session; input `image`, output named like the task."""
        path = self.folder / self.entry(task)["file"]
        if task not in self._sessions:
            options = onnxruntime.SessionOptions()
            options.intra_op_num_threads = self.threads
            options.inter_op_num_threads = 1
            options.enable_mem_pattern = bool(self.entry(task)["input_size"])  # it keeps a plan for every size it met
            options.log_severity_level = 3  # errors; what it warns about is its own memory planning
            try:
                session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
            except Exception as error:  # onnxruntime's exceptions share no base class
                reason = str(error).splitlines()[0]
                raise InputError(f"onnxruntime cannot load {path}: {reason}; export the package again") from error
            _check_graph(session, task, self.entry(task), path)
            self._sessions[task] = session
        return self._sessions[task]

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
        (result,) = self.session(task).run([task], {"image": images}, self._run_options(task, images.shape))
        return np.asarray(result, dtype=np.float32)

    def _run_options(self, task: str, shape: tuple[int, ...]) -> onnxruntime.RunOptions | None:
        """Have onnxruntime give its memory back after a run of another size than the last.

        It would keep what every size needed, and images of many sizes take gigabytes in the end. Not after every run:
        at one size, giving back and taking again costs up to half of the time.
        """
        last, self._shapes[task] = self._shapes.get(task, shape), shape
        if last == shape:
            return None
        options = onnxruntime.RunOptions()
        options.add_run_config_entry("memory.enable_memory_arena_shrinkage", "cpu:0")
        return options

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
        height, width = image.shape[:2]
        entry = self.entry(task)
        fixed, patch = entry["input_size"], entry["patch_multiple"]
        if resize:
            target = tuple(fixed or self.manifest["image"]["train_size"])
        elif fixed and tuple(fixed) != (height, width):
            raise InputError(
                f"the image is {height}x{width} (height x width) and {task} was exported for {fixed[0]}x{fixed[1]} "
                "only: give such images, allow resizing, or export without a fixed size"
            )
        elif min(height, width) < patch:
            raise InputError(f"the image is {height}x{width} (height x width): {task} needs at least {patch}x{patch}")
        else:
            target = self._graph_size(task, height, width)
        patches = (target[0] // patch) * (target[1] // patch)
        if patches > MAX_PATCHES and not (resize or fixed):
            raise InputError(
                f"the image is {height}x{width} (height x width), {patches} patches of {patch}x{patch}: attention over "
                f"more than {MAX_PATCHES} takes gigabytes; allow resizing (--resize), or give a smaller image"
            )
        if target != (height, width):
            image = np.asarray(Image.fromarray(image).resize(target[::-1], Image.Resampling.BILINEAR))
        decoded = decode(self.logits(image[None], task), entry["decode"])[0]
        return decoded if target == (height, width) else _resized(decoded, (height, width), entry["decode"])

    def _graph_size(self, task: str, height: int, width: int) -> tuple[int, int]:
        """Return the size (height, width) nearest to the given one that the task's graph takes."""
        entry = self.entry(task)
        if entry["input_size"]:
            return entry["input_size"][0], entry["input_size"][1]
        patch = entry["patch_multiple"]
        return max(patch, round(height / patch) * patch), max(patch, round(width / patch) * patch)


def _check_graph(session: onnxruntime.InferenceSession, task: str, entry: dict[str, Any], path: Path) -> None:
    """Raise InputError for a graph that the manifest cannot have meant, although it names it with its hash."""
    channels = {output.name: output.shape[1] for output in session.get_outputs() if len(output.shape) == 4}
    if task not in channels or "image" not in {graph_input.name for graph_input in session.get_inputs()}:
        raise InputError(f"{path} is not a graph of {task}: the package was put together wrongly; export it again")
    if channels[task] != entry.get("channels", channels[task]):
        raise InputError(
            f"{path} has {channels[task]} channels, not {entry['channels']} as {MANIFEST} says: export again"
        )


def _check_manifest(path: Path, manifest: Any) -> list[dict[str, Any]]:
    """Return the manifest's entries of files, or raise InputError if it lacks anything that this module reads."""
    if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
        raise InputError(f"{path} is not an m3vit package's: {_NO_PACKAGE}")
    version = manifest.get("format_version")
    if version != FORMAT_VERSION:
        raise InputError(f"{path} has format version {version}, this m3vit reads {FORMAT_VERSION}: export it again")
    try:
        image, tasks = manifest["image"], manifest["tasks"]
        entries = [manifest["weights"], *tasks.values()]
        complete = len(image["mean"]) == len(image["std"]) == 3 and len(image["train_size"]) == 2 and bool(tasks)
        for entry in entries:
            # A plain name: a manifest from a stranger must not make us read files elsewhere.
            complete &= Path(entry["file"]).name == entry["file"] and isinstance(entry["sha256"], str)
        for entry in tasks.values():
            complete &= entry["decode"] in DECODERS and int(entry["patch_multiple"]) > 0
            complete &= entry["input_size"] is None or len(entry["input_size"]) == 2
            complete &= entry["decode"] != "argmax" or len(entry["palette"]) > 0
    except (KeyError, TypeError, AttributeError, ValueError):
        complete = False
    if not complete:
        raise InputError(f"{path} is damaged, entries are missing or of the wrong kind: export the package again")
    return entries


def _argmax(logits: NDArray[np.float32]) -> NDArray[np.uint8]:
    return logits.argmax(axis=1).astype(np.uint8)


def _identity(logits: NDArray[np.float32]) -> NDArray[np.float32]:
    return logits[:, 0]


def _unit_vector(logits: NDArray[np.float32]) -> NDArray[np.float32]:
    return _unit(logits.transpose(0, 2, 3, 1))


def _sigmoid(logits: NDArray[np.float32]) -> NDArray[np.float32]:
    # exp of a negative number only: no overflow.
    small = np.exp(-np.abs(logits[:, 0]))
    return np.where(logits[:, 0] >= 0, 1 / (1 + small), small / (1 + small)).astype(np.float32)


DECODERS: dict[str, Callable[[NDArray[np.float32]], NDArray[Any]]] = {
    "argmax": _argmax,
    "identity": _identity,
    "unit_vector": _unit_vector,
    "sigmoid": _sigmoid,
}


def decode(logits: NDArray[np.float32], kind: str) -> NDArray[Any]:
    """Turn logits [B, C, H, W] into predictions [B, H, W] or, for unit_vector, [B, H, W, 3].

    `kind`: argmax (class ids uint8), identity (the value itself), unit_vector (length 1), sigmoid (0..1).
    """
    return DECODERS[kind](logits)


def _unit(vectors: NDArray[np.float32]) -> NDArray[np.float32]:
    """Scale vectors [..., 3] to length 1; a zero vector stays zero."""
    length = np.linalg.norm(vectors, axis=-1, keepdims=True)
    return np.asarray(vectors / np.maximum(length, np.float32(1e-12)), dtype=np.float32)


def _resized(array: NDArray[Any], size: tuple[int, int], kind: str) -> NDArray[Any]:
    """Resize a prediction [h, w] or [h, w, 3] to `size` (height, width): ids by nearest, values bilinearly."""
    shape = size[::-1]
    if kind == "argmax":
        return np.asarray(Image.fromarray(array).resize(shape, Image.Resampling.NEAREST))
    if array.ndim == 2:
        return np.asarray(Image.fromarray(array).resize(shape, Image.Resampling.BILINEAR))
    channels = [_resized(np.ascontiguousarray(array[..., axis]), size, "identity") for axis in range(3)]
    return _unit(np.stack(channels, axis=-1))
