"""m3vit data: synth, extract, prepare, init, check, show."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from m3vit.commands.terminal import progress_bar, say
from m3vit.errors import InputError
from m3vit.options import File, Folder, Number, Positive, Size, Value, words


def _writers() -> list[str]:
    from m3vit.data.synthetic.scenes.layouts import WRITERS

    return list(WRITERS)


@dataclass(frozen=True)
class Synth:
    """Options of m3vit data synth.

    Attributes:
        out: folder to write, new or empty; becomes a data root
        layout: nyud: rooms, as in NYUD_MT; pascal: people and objects, as in PASCAL_MT
        train: training images
        val: validation images
        size: of the images, in pixels
        seed: decides every scene
        workers: processes (default: one a core)
    """

    out: Path
    layout: Annotated[str, Value(choices=_writers)] = "nyud"
    train: Positive = 400
    val: Positive = 100
    size: Size = (96, 128)
    seed: Number = 0
    workers: Positive | None = None


def run_synth(wanted: Synth) -> None:
    from m3vit.data.synthetic.dataset import synthesize

    with progress_bar("rendering scenes") as bar:
        synthesize(**vars(wanted), progress=bar)
    say(f"{wanted.train} training and {wanted.val} validation scenes in {wanted.out}")


@dataclass(frozen=True)
class Begin:
    """Options of m3vit data init.

    Attributes:
        root: the folder that holds photographs and labels
        out: write data.yaml into this folder, where ROOT cannot be written to (default: ROOT)
        overwrite: replace the data.yaml that is there
    """

    root: Annotated[Path, Value(metavar="ROOT", positional=True)]
    out: Folder | None = None
    overwrite: bool = False


def run_begin(wanted: Begin) -> None:
    from m3vit.data.tools.begin import begin

    with progress_bar("looking at files") as bar:
        path, lines = begin(wanted.root, out=wanted.out, overwrite=wanted.overwrite, progress=bar)
    say("\n".join([f"{path}: read its comments, mend what is wrong", *(f"  {line}" for line in lines)]))
    say(f"then: m3vit data check {path.parent}")


@dataclass(frozen=True)
class Check:
    """Options of m3vit data check.

    Attributes:
        root: the data set's folder, which holds gt_sets/, ImageSets/ or data.yaml
        tasks: look at these alone, such as semseg,depth (default: all)
        json: write the whole report as JSON (default: none)
        workers: processes (default: one a core)
        quick: compare lists and names alone, open no file
    """

    root: Annotated[Path, Value(metavar="ROOT", positional=True)]
    tasks: Annotated[tuple[str, ...], Value(words, "TASK,...")] | None = None
    json: File | None = None
    workers: Positive | None = None
    quick: bool = False


def run_check(wanted: Check) -> int:
    from m3vit.data.tools.check import check, render

    if wanted.quick and wanted.workers:
        raise InputError("--quick opens no file, and --workers are processes that open them: leave one of them out")
    with progress_bar("checking samples") as bar:
        report = check(wanted.root, quick=wanted.quick, tasks=wanted.tasks, workers=wanted.workers, progress=bar)
    if wanted.json is not None:
        from m3vit.files import write_json

        write_json(wanted.json, report.to_dict())
    say(render(report))
    return 0 if report.ok else 1


@dataclass(frozen=True)
class Show:
    """Options of m3vit data show.

    Attributes:
        root: the data set's folder, which holds gt_sets/, ImageSets/ or data.yaml
        out: the png to write; one that is there is replaced (default: ROOT's name and -sheet.png, here)
        images: images on the sheet, of train and val
        tasks: these alone, such as semseg,depth (default: all)
    """

    root: Annotated[Path, Value(metavar="ROOT", positional=True)]
    out: File | None = None
    images: Positive = 8
    tasks: Annotated[tuple[str, ...], Value(words, "TASK,...")] | None = None


def run_show(wanted: Show) -> None:
    from m3vit.report.sheet import show

    out = wanted.out or Path(f"{wanted.root.resolve().name}-sheet.png")
    with progress_bar("reading labels") as bar:
        lines = show(wanted.root, out, images=wanted.images, tasks=wanted.tasks, progress=bar)
    say("\n".join([str(out), *(f"  {line}" for line in lines)]))


@dataclass(frozen=True)
class Prepare:
    """Options of m3vit data prepare.

    Attributes:
        dataset: nyud: NYUD_MT's files from the official NYU Depth v2
        labeled: nyu_depth_v2_labeled.mat (2.8 GB)
        splits: splits.mat (official train and test images)
        classes: classMapping40.mat (894 labels to 40 classes)
        out: folder to write, new or empty; becomes a data root
        depth: metres; measured: 0 where the Kinect saw nothing; filled: the in-painted depths
        sha256: note the sources' hashes in prepared.json (reads them once more)
        workers: processes (default: one a core)
    """

    dataset: Annotated[Literal["nyud"], Value(positional=True)]
    labeled: File
    splits: File
    classes: File
    out: Path
    depth: Literal["measured", "filled"] = "measured"
    sha256: bool = False
    workers: Positive | None = None


def run_prepare(wanted: Prepare) -> None:
    from m3vit.data.tools.prepare import prepare_nyud

    given = {name: value for name, value in vars(wanted).items() if name != "dataset"}  # of which there is one
    with progress_bar("preparing images") as bar:
        notes = prepare_nyud(**given, progress=bar)
    counts = notes["counts"]
    remark = "" if notes["official_counts"] else ", which are not the official 795 and 654"
    say(f"{counts['train']} training and {counts['val']} validation images in {wanted.out}{remark}")


@dataclass(frozen=True)
class Extract:
    """Options of m3vit data extract.

    Attributes:
        archive: .tgz, .tar.gz, .tar or .zip of a data set
        out: folder to write, new or empty
    """

    archive: Annotated[Path, Value(metavar="ARCHIVE", positional=True)]
    out: Path


def run_extract(wanted: Extract) -> None:
    from m3vit.data.tools.archives import extract
    from m3vit.data.tools.check import describe

    with progress_bar("unpacking (MiB)") as bar:
        root = extract(wanted.archive, wanted.out, bar)
    say(f"{describe(root)}: {root}")
