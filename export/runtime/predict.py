"""Predict images, folders, videos and streams with an exported package: m3vit predict. No torch."""

import os
import signal
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from threading import Event
from types import TracebackType
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from m3vit.errors import InputError
from m3vit.export.runtime.drawing import Range, colourise, overlay
from m3vit.export.runtime.options import Loading, Options
from m3vit.export.runtime.overlap import Behind, Pace, ahead
from m3vit.export.runtime.package import ALL, Package
from m3vit.export.runtime.sources import Found, Source, find_sources
from m3vit.files import atomic_path
from m3vit.images import read_image
from m3vit.kinds import KINDS
from m3vit.signals import StopSignals

if TYPE_CHECKING:  # PyAV is an extra
    from m3vit.export.runtime.video import Film, Frame

_LISTED = 5  # names in a message
_FILM_ROWS = 3  # of the legend of classes: a film's pictures have one size, whatever they show
_SMOOTHING = 0.05  # of the depth scale from frame to frame


@dataclass
class Outcome:
    """Files written, inputs that failed and why (whole or in part), and the signal that ended it early.

    `paces`: of each film, how many frames a second were predicted, and how steadily. `found`: also what was left out
    of the inputs' folders, and why.
    """

    written: list[Path] = field(default_factory=list)
    failures: list[tuple[str, str]] = field(default_factory=list)
    paces: list[tuple[str, str]] = field(default_factory=list)
    found: Found = field(default_factory=Found)
    stopped: signal.Signals | None = None


def predict_files(
    package_dir: Path,
    task: str,
    inputs: Sequence[Path],
    out: Path,
    options: Options = Options(),
    *,
    loading: Loading = Loading(),
    say: Callable[[str], None] = lambda line: None,
    progress: Callable[..., None] = lambda done, total, text="": None,
) -> Outcome:
    """Predict a task, or "all", for every input into the folder `out` (created if needed).

    `inputs` are image files, video files, folders (searched for both, recursively and by content; names below them are
    kept) and `sources.STREAM`. An image becomes `<name>_<task>.png`, a video or stream `<name>_<task>.mp4` with the
    same times of frames, a stream's name being `stdin`: a picture to look at (`drawing.colourise`), or with `overlay`
    laid over the input with a legend. With `raw`, `<name>_<task>.npy` is the prediction itself (`Package.predict`,
    which also says what `resize` does), of a video [frames, H, W] or [frames, H, W, 3].

    What cannot be read or predicted is noted and passed over. SIGINT and SIGTERM end it: finished files stay, a
    stream's are completed with the frames that came, those of an unfinished video file are dropped. Memory holds one
    image, or a few frames: those before are drawn, and those behind decoded, while one is predicted. `say` gets each
    file as it is written, `progress` (inputs done, of how many, what now).

    Raises InputError before anything is run for a bad package or task, missing inputs, predictions that would have
    one name, overwrite an input, or, without `force`, overwrite anything.
    """
    package = Package.load(package_dir, **vars(loading))
    tasks = package.tasks if task == ALL else [task]
    for name in tasks:
        package.entry(name)
    found = find_sources(inputs, out)
    sources = found.sources
    check_options(package, sources, tasks, options)
    check_outputs(sources, tasks, out, options)
    if any(source.kind != "image" for source in sources):
        from m3vit.export.runtime import video  # noqa: F401 (a missing PyAV is noticed before anything is run)
    outcome = Outcome(found=found)
    run = _Run(package, tasks, out, options, outcome, say)
    with StopSignals((signal.SIGINT, signal.SIGTERM)) as signals:
        for done, source in enumerate(sources):
            if signals.received:
                break
            progress(done, len(sources), source.label)
            try:
                if source.kind == "image":
                    run.image(source)
                else:
                    run.film(source, signals, lambda text, done=done: progress(done, len(sources), text))  # type: ignore[misc]
            except InputError as error:
                outcome.failures.append((source.label, _reason(error, source.label)))
            except Interrupted:
                break
        else:
            progress(len(sources), len(sources))
        outcome.stopped = signals.received
    return outcome


# ------------------------------------------------------------------------------------------------------ what to do


def check_options(package: Package, sources: Sequence[Source], tasks: Sequence[str], options: Options) -> None:
    """Raise InputError for an option that nothing here could obey."""
    if options.fps is not None and all(source.kind == "image" for source in sources):
        raise InputError("--fps is of videos and streams, and the inputs are images alone: leave it out")
    if options.depth_range is not None and not any(KINDS[package.entry(task)["decode"]].own_range for task in tasks):
        raise InputError(f"--depth-range is of depth, and {', '.join(tasks)} has none: leave it out")


def output_paths(source: Source, task: str, out: Path, options: Options) -> list[Path]:
    """Return the picture's path and, with `raw`, the values'."""
    base = out / source.name
    suffixes = [".png" if source.kind == "image" else ".mp4", *([".npy"] if options.raw else [])]
    return [base.with_name(f"{base.name}_{task}{suffix}") for suffix in suffixes]


def check_outputs(sources: Sequence[Source], tasks: Sequence[str], out: Path, options: Options) -> None:
    """Raise InputError if any prediction's file is taken, by an input, another prediction or something else."""
    inputs = {source.path.resolve(): source for source in sources if source.kind != "stream"}
    origin: dict[Path, Source] = {}
    taken = []
    for source in sources:
        for path in (path for task in tasks for path in output_paths(source, task, out, options)):
            if path in origin:
                raise InputError(
                    f"{origin[path].label} and {source.label} would both become {path.relative_to(out)}: "
                    "predict them separately"
                )
            origin[path] = source
            if path.resolve() in inputs:
                raise InputError(f"{path} would overwrite an input of that name: choose another folder")
            if path.is_dir():
                raise InputError(f"{path} is a folder and would be a prediction: choose another folder")
            if os.path.lexists(path):
                taken.append(str(path))
    for folder in {parent for path in origin for parent in path.parents}:
        if folder.exists() and not folder.is_dir():
            raise InputError(f"{folder} is a file: give a folder for the predictions")
    if taken and not options.force:
        more = f" and {len(taken) - _LISTED} more" if len(taken) > _LISTED else ""
        raise InputError(f"{', '.join(taken[:_LISTED])}{more} would be overwritten: choose another folder or --force")


# ----------------------------------------------------------------------------------------------------------- doing


class Interrupted(Exception):  # noqa: N818 (not an error)
    """A signal came in the middle of a video file."""


class _DepthScale:
    """The range of depth that a film's colours show: given, or following that of its frames slowly."""

    def __init__(self, given: Range | None) -> None:
        self.given, self.current = given, given

    def follow(self, limits: Range | None) -> Range | None:
        """Return the range for a frame whose own is `limits`."""
        limits = None if self.given else limits
        if limits and self.current:
            near, far = (old + _SMOOTHING * (new - old) for old, new in zip(self.current, limits, strict=True))
            self.current = (near, far)
        else:
            self.current = self.current or limits
        return self.current


@dataclass
class _Run:
    """Predicts one input after the other."""

    package: Package
    tasks: list[str]
    out: Path
    options: Options
    outcome: Outcome
    say: Callable[[str], None]

    def image(self, source: Source) -> None:
        """Predict an image; its tasks' files appear as each is done."""
        pixels = read_image(source.path, self.options.max_pixels)
        for task, prediction in self._predictions(pixels):
            picture, *values = output_paths(source, task, self.out, self.options)
            with atomic_path(picture) as temporary:
                drawn = self._draw(pixels, prediction, task, self.options.depth_range)
                Image.fromarray(drawn).save(temporary, format="PNG")
            self._written(picture)
            for path in values:
                with atomic_path(path) as temporary:
                    np.save(temporary, prediction)
                self._written(path)

    def film(self, source: Source, signals: StopSignals, progress: Callable[[str], None]) -> None:
        """Predict a video or stream; the files of all tasks appear together, when it ends."""
        from m3vit.export.runtime.video import StandardInput, open_film

        stop = Event()
        stream = source.kind == "stream"
        origin: Path | StandardInput = source.path
        if stream:
            origin = StandardInput(lambda: signals.received is not None or stop.is_set())
        with open_film(origin, self.options.max_pixels, self.options.fps) as film:
            # Frames are decoded and drawn beside the inference; left in the reverse order, so that no thread works
            # with a film or a file that is closed.
            with ExitStack() as files, Behind() as drawing, closing(ahead(film, stop)) as frames:
                writers: list[_TaskWriter] = []
                count, pace = 0, Pace()
                for frame in frames:
                    if signals.received and not stream:
                        raise Interrupted
                    writers = writers or [self._writer(source, task, film, files) for task in self.tasks]
                    try:
                        predictions = dict(self._predictions(frame.picture))
                    except InputError as error:
                        raise InputError(f"frame {count + 1}: {error}") from error
                    drawing.call(partial(self._frame, frame, writers, predictions))
                    count += 1
                    pace.tick()
                    progress(f"{source.label} frame {count}{f' of {film.frames}' if film.frames else ''}")
                drawing.finish()
                if not writers:
                    raise InputError("it holds no frame that can be decoded: give another video")
            for writer in writers:
                for path in writer.paths:
                    self._written(path)
            if line := pace.line():
                self.outcome.paces.append((source.label, line))
            if film.problems:
                kept = f"the predictions hold the {count} frames that could be read"
                raise InputError(f"{'; '.join(film.problems)}: {kept}")

    def _writer(self, source: Source, task: str, film: "Film", files: ExitStack) -> "_TaskWriter":
        """Open the files of a task; leaving `files` completes them, or drops them if an exception comes through."""
        paths = output_paths(source, task, self.out, self.options)
        temporary = [files.enter_context(atomic_path(path)) for path in paths]
        return files.enter_context(_TaskWriter(task, film, paths, temporary, self.options.depth_range))

    def _predictions(self, picture: NDArray[np.uint8]) -> Iterator[tuple[str, NDArray[Any]]]:
        """Yield each task and its prediction: one after the other, or all at once where the package can."""
        if self.tasks == self.package.tasks and self.package.all_at_once:
            yield from self.package.predict(picture, ALL, resize=self.options.resize).items()
            return
        for task in self.tasks:
            yield task, self.package.predict(picture, task, resize=self.options.resize)

    def _frame(self, frame: "Frame", writers: list["_TaskWriter"], predictions: dict[str, NDArray[Any]]) -> None:
        """Draw and write one frame of every task."""
        for writer in writers:
            prediction = predictions[writer.task]
            kind, scale = KINDS[self.package.entry(writer.task)["decode"]], None
            if kind.own_range:
                scale = writer.scale.follow(kind.limits(prediction))
            drawn = self._draw(frame.picture, prediction, writer.task, scale, _FILM_ROWS)
            writer.write(drawn, prediction, frame.time)

    def _draw(
        self,
        image: NDArray[np.uint8],
        prediction: NDArray[Any],
        task: str,
        scale: Range | None,
        rows: int | None = None,
    ) -> NDArray[np.uint8]:
        if self.options.overlay:
            return overlay(image, prediction, task, self.package.manifest, scale, rows)
        return colourise(prediction, task, self.package.manifest, scale)

    def _written(self, path: Path) -> None:
        self.outcome.written.append(path)
        self.say(str(path))


class _TaskWriter:
    """The files of one task of a film: pictures, and values if asked for. Opened with the first picture."""

    def __init__(
        self, task: str, film: "Film", paths: list[Path], temporary: list[Path], depth_range: Range | None
    ) -> None:
        self.task, self.film, self.paths, self._temporary = task, film, paths, temporary
        self.scale = _DepthScale(depth_range)
        self._files = ExitStack()
        self._pictures: Any = None
        self._values: ArrayWriter | None = None

    def __enter__(self) -> "_TaskWriter":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._files.__exit__(kind, error, trace)

    def write(self, picture: NDArray[np.uint8], prediction: NDArray[Any], time: int) -> None:
        """Append a picture and the values it shows."""
        if self._pictures is None:
            from m3vit.export.runtime.video import FilmWriter

            height, width = picture.shape[:2]
            film = self.film
            writer = FilmWriter(self._temporary[0], film.rate, film.time_base, (height, width))
            self._pictures = self._files.enter_context(writer)
            if len(self._temporary) > 1:
                values = ArrayWriter(self._temporary[1], prediction.dtype, prediction.shape)
                self._values = self._files.enter_context(values)
        self._pictures.write(picture, time)
        if self._values:
            self._values.append(prediction)


class ArrayWriter:
    """Writes a .npy file [N, *shape] of which N is known only at the end, one item at a time."""

    def __init__(self, path: Path, dtype: np.dtype[Any], shape: tuple[int, ...]) -> None:
        self._file = open(path, "wb")
        self.dtype, self.shape, self.count = dtype, shape, 0
        self._header()

    def _header(self) -> None:
        header = {
            "descr": np.lib.format.dtype_to_descr(self.dtype),
            "fortran_order": False,
            "shape": (self.count, *self.shape),
        }
        # numpy leaves room for N to grow in place.
        np.lib.format.write_array_header_1_0(self._file, header)  # type: ignore[arg-type]

    def append(self, item: NDArray[Any]) -> None:
        """Append an item of the dtype and shape given."""
        assert item.dtype == self.dtype and item.shape == self.shape
        self._file.write(np.ascontiguousarray(item).data)
        self.count += 1

    def __enter__(self) -> "ArrayWriter":
        return self

    def __exit__(self, *_: object) -> None:
        self._file.seek(0)
        self._header()
        self._file.close()


def _reason(error: InputError, label: str) -> str:
    """Return an error's text on one line, without the input's name at its start."""
    return " ".join(str(error).split()).removeprefix(f"{label}: ").removeprefix(f"{label} ")
