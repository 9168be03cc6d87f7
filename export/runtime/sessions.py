"""The onnxruntime sessions of a package's graphs, and the cache of graphs laid out for a machine. No torch."""

import hashlib
import threading
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from m3vit.errors import InputError, WriteError, first_line
from m3vit.export.runtime.manifest import MANIFEST
from m3vit.export.runtime.opened import OpenedFiles
from m3vit.export.runtime.ort import onnxruntime, session_options
from m3vit.files import atomic_folder, read_json, sha256_file, write_json
from m3vit.staging import locked

Outputs = dict[str, int | None]  # of a graph: names, in its order, and channels where they are known
GRAPH, WEIGHTS, LISTING = "graph.onnx", "weights.bin", "entry.json"  # of an entry of the cache


@dataclass(frozen=True)
class Cache:
    """A folder of graphs with weights laid out for `machine`. `verify`: hash an entry's files before they are used."""

    folder: Path
    machine: str
    verify: bool = True


class Sessions:
    """The sessions of a package's graphs, made when they are first asked for. All read the file `weights`."""

    def __init__(self, files: OpenedFiles, weights: str, threads: int, low_memory: bool, cache: Cache | None) -> None:
        self.files, self.weights, self.threads, self.low_memory, self.cache = files, weights, threads, low_memory, cache
        self.sessions: dict[str, onnxruntime.InferenceSession] = {}
        self.mapped: dict[str, OpenedFiles] = {}  # where each session's weights are
        self.shapes: dict[str, list[tuple[int, ...]]] = {}  # of the inputs of each session's last run
        self.lock = threading.Lock()  # a service's threads ask for the same session at once

    def run(
        self, entry: dict[str, Any], inputs: dict[str, NDArray[Any]], outputs: Outputs
    ) -> list[NDArray[np.float32]]:
        """Run one graph, by its entry in the manifest, and return its outputs; `outputs` as in `get`.

        After a run of another size than the last, onnxruntime gives its memory back: it would keep what every size
        needed, and images of many sizes take gigabytes in the end. Not after every run: at one size, giving back and
        taking again costs up to half of the time.
        """
        session = self.get(entry, tuple(inputs), outputs)
        shapes = [value.shape for value in inputs.values()]
        last, self.shapes[entry["file"]] = self.shapes.get(entry["file"], shapes), shapes
        options = None
        if last != shapes and not self.low_memory:  # which keeps nothing anyway
            options = onnxruntime.RunOptions()
            options.add_run_config_entry("memory.enable_memory_arena_shrinkage", "cpu:0")
        results = session.run(list(outputs), inputs, options)
        files = self.mapped[entry["file"]]
        files.check_mapped(self.weights if files is self.files else WEIGHTS)  # after the run: it may happen meanwhile
        return [np.asarray(result, dtype=np.float32) for result in results]

    def get(self, entry: dict[str, Any], inputs: tuple[str, ...], outputs: Outputs) -> onnxruntime.InferenceSession:
        """Return the session of one graph, by its entry in the manifest, or raise InputError if it is another's graph.

        `inputs` are the names that it must have, `outputs` those of its outputs, with their channels.
        """
        with self.lock:
            if entry["file"] not in self.sessions:
                self.sessions[entry["file"]] = self._make(entry, inputs, outputs)
            return self.sessions[entry["file"]]

    def _make(self, entry: dict[str, Any], inputs: tuple[str, ...], outputs: Outputs) -> onnxruntime.InferenceSession:
        path = self.files.folder / entry["file"]
        try:
            session = self._cached(entry) if self.cache is not None else self._plain(entry)
        except (InputError, OSError):
            raise
        except Exception as error:  # onnxruntime's exceptions share no base class
            reason = first_line(error).replace(str(self.files.place), str(self.files.folder))
            raise InputError(f"onnxruntime cannot load {path}: {reason}; export the package again") from error
        found, results = tuple(one.name for one in session.get_inputs()), session.get_outputs()
        widths = [(one.shape[1], outputs.get(one.name)) for one in results]
        fits = all(wanted is None or not isinstance(width, int) or width == wanted for width, wanted in widths)
        if found != inputs or [one.name for one in results] != list(outputs) or not fits:
            raise InputError(f"{path} is not the graph that {MANIFEST} describes: export the package again")
        return session

    def _options(self) -> onnxruntime.SessionOptions:
        options = session_options(self.threads)
        options.enable_mem_pattern = False  # it keeps a plan for every size it met
        # Threads of a session that is not running would go on waiting at full speed, and take the cores from the next
        # task's (on two cores, a switch took nearly as long again as the run).
        options.add_session_config_entry("session.force_spinning_stop", "1")
        if self.low_memory:
            options.add_session_config_entry("session.disable_prepacking", "1")
            # Each session would keep the memory of its largest run for itself.
            options.enable_cpu_mem_arena = False
        return options

    def _plain(self, entry: dict[str, Any]) -> onnxruntime.InferenceSession:
        """Return a session of the package's own graph."""
        session = _create(self.files, (entry["file"], self.weights), self._options())
        self.mapped[entry["file"]] = self.files
        return session

    # ------------------------------------------------------------------------------------------------ the cache

    def _cached(self, entry: dict[str, Any]) -> onnxruntime.InferenceSession:
        """Return a session whose graph was optimised and whose weights were laid out before, on a machine like this.

        An entry that is damaged, or of another package or machine, is made anew. Processes that want the same one at a
        time make it once.
        """
        assert self.cache is not None
        made_for = self.made_for(entry)
        key = hashlib.sha256(made_for.encode()).hexdigest()[:16]
        home = self.cache.folder / f"{Path(entry['file']).stem}-{key}"
        session = self.open_entry(home, entry, made_for)
        if session is None:
            self.cache.folder.mkdir(parents=True, exist_ok=True)
            with locked(self.cache.folder):
                session = self.open_entry(home, entry, made_for) or self._make_entry(home, entry, made_for)
        return session

    def made_for(self, entry: dict[str, Any]) -> str:
        """Return what an entry of the cache is for: a graph, its weights and a machine."""
        assert self.cache is not None
        return f"{self.files.digests[entry['file']]} {self.files.digests[self.weights]} {self.cache.machine}"

    def open_entry(
        self, home: Path, entry: dict[str, Any], made_for: str, folder: Path | None = None
    ) -> onnxruntime.InferenceSession | None:
        """Return the session of an entry, or None if there is none, or none that is as it was made.

        Its listing needs no digest of its own: whatever is changed in it no longer fits the files or the key.
        `folder`: where it is, while it is not yet at `home`.
        """
        assert self.cache is not None
        folder = folder or home
        try:
            listing = read_json(folder / LISTING, "no entry of the cache")
            found = {path.name for path in folder.iterdir()} - {LISTING}
            if listing["made_for"] != made_for or set(listing["files"]) != found or GRAPH not in found:
                return None
            files = OpenedFiles(folder, listing["files"], "make it again")
            if not self.cache.verify:
                files.trust()
            options = self._options()
            options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
            session = _create(files, tuple(found), options)
        except Exception:  # whatever a damaged file leads to: it is made again
            return None
        files.folder = home
        self.mapped[entry["file"]] = files
        return session

    def _make_entry(self, home: Path, entry: dict[str, Any], made_for: str) -> onnxruntime.InferenceSession:
        """Write an entry and return its session."""
        assert self.cache is not None
        # Of files that the caller vouched for too: the entry is found by their digests, by callers who did not.
        for name in (entry["file"], self.weights):
            self.files.check(name, trusting=False)
        if home.is_symlink() or home.is_file():
            home.unlink(missing_ok=True)  # not what a link leads to
        session = None
        try:
            with atomic_folder(home) as folder:
                self._optimise(folder, entry)
                digests = {path.name: sha256_file(path) for path in folder.iterdir()}
                write_json(folder / LISTING, {"made_for": made_for, "files": digests})
                session = self.open_entry(home, entry, made_for, folder)
                if session is None:
                    raise self._no_cache("what onnxruntime wrote cannot be read")
        except WriteError:
            if session is None:
                raise
            # Where folders cannot be locked another process may have put its own there first. This one's is as good.
        assert session is not None
        return session

    def _optimise(self, folder: Path, entry: dict[str, Any]) -> None:
        """Let onnxruntime write a graph, with its weights laid out for this machine, into a folder."""
        options = self._options()
        options.optimized_model_filepath = str(folder / GRAPH)
        for name, value in (
            ("save_external_prepacked_constant_initializers", "1"),
            ("optimized_model_external_initializers_file_name", WEIGHTS),
            ("optimized_model_external_initializers_min_size_in_bytes", "1024"),
        ):
            options.add_session_config_entry(f"session.{name}", value)
        try:
            _create(self.files, (entry["file"], self.weights), options)
        except Exception as error:
            self._plain(entry)  # raises what the package, not the cache, is to blame for
            raise self._no_cache(first_line(error)) from error

    def _no_cache(self, reason: str) -> InputError:
        assert self.cache is not None
        return InputError(
            f"the cache {self.cache.folder} cannot be written ({reason}): give another folder, or leave the cache out"
        )


def _create(
    files: OpenedFiles, names: tuple[str, ...], options: onnxruntime.SessionOptions
) -> onnxruntime.InferenceSession:
    """Return a session of the one graph among files that are what they should be, before and after it is made."""
    for name in names:
        files.check(name)
    graph = next(name for name in names if name.endswith(".onnx"))
    try:
        return onnxruntime.InferenceSession(str(files.place / graph), options, providers=["CPUExecutionProvider"])
    finally:  # it opened them by name: whatever came of others is worth nothing
        for name in names:
            files.check(name)
