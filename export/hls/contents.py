"""The files of an emitted project: which decide the results that we claim, and which are there to be edited.

Protected files are refused when they were changed since the export. Editable ones may differ: C-simulation compiles
what is there, compares it as ever, and its results name the changed files.
"""

from collections.abc import Iterable, Iterator, Mapping, Set
from contextlib import contextmanager
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from m3vit.digests import read_sealed_json
from m3vit.errors import InputError
from m3vit.evaluation.protocols import of_evaluation
from m3vit.files import require_replaceable, sha256_file
from m3vit.hw.manifest import MANIFEST, read_manifest
from m3vit.hw.sim.csim import TESTBENCH, TIMED_BENCH
from m3vit.staging import PARTIAL

# Pattern of a name below the project's folder (* matches / too), whether it may be edited, what it holds; the first
# that matches counts.
CLASSES = (
    ("firmware/weights/*", False, "weights, and in the multiplexed schedule the program"),
    ("tb_data/*", False, "stored images and labels, and what outputs are compared with"),
    ("firmware/defines.h", False, "number formats of the spatial schedule"),
    ("firmware/model.h", False, "number formats of the multiplexed schedule's outputs"),
    ("firmware/*.h", True, "sources: kernels, engines, and their configuration in parameters.h"),
    ("firmware/*.cpp", True, "the top level: ports and pragmas"),
    ("*.h", True, "sources of the test bench"),
    ("*.cpp", True, "the test bench and the bridge to Python"),
    ("*.tcl", True, "part, clock and steps of the vendor's tools"),
    ("*.sh", True, "the build of the bridge to Python"),
    ("Makefile", True, "the build of the test bench"),
    ("host/*.py", True, "the driver on the board"),
    ("README.md", True, "what you are told"),
    ("*", False, "formats, memory map, modelled resources"),
)
# What our commands leave in a project, and compilers: an export may replace it.
BUILT = {
    MANIFEST,
    TESTBENCH,
    TIMED_BENCH,
    "csim.json",
    "csim_timed.json",
    "tb_data/csim_timed.bin",
    "tb_data/csim_outputs.npz",
    "tb_data/csim_outputs.bin",
    "tb_data/csim_results.log",
}
EDITING = """## Changing it

Clock and part (`*.tcl`), sources and configuration (`firmware/*.h`, `firmware/*.cpp`, the test bench), `Makefile` and
`*.sh` may be edited: `m3vit hw csim .` compiles what is there, compares it as before, and names the changed files in
its last line and in `csim.json`; so does `m3vit eval .`. What results rest on is refused once it was changed:
`firmware/weights/`, `tb_data/`, the number formats (`firmware/{formats}`, `hls4ml_config.yml`) and `m3vit.json`, whose
`files` has the sha256 of every file and whose `editable` lists those that may differ.
"""


def may_edit(name: str) -> bool:
    """Return whether a file of a project, named from its folder, is there to be edited."""
    return next(editable for pattern, editable, _ in CLASSES if fnmatchcase(name, pattern))


def editable_names(names: Iterable[str]) -> list[str]:
    """Return those of a project's files that are there to be edited: `editable` of the manifest."""
    return sorted(name for name in names if may_edit(name))


def open_project(project: Path) -> tuple[dict[str, Any], list[str]]:
    """Return the manifest of a project, and which of its files were edited since the export.

    Raises InputError if it is not a project, a file is missing, or a protected one was changed.
    """
    manifest = read_manifest(project)
    files = manifest["files"]
    return manifest, check_contents(project, files, set(manifest.get("editable", editable_names(files))))


def check_contents(project: Path, digests: Mapping[str, str], editable: Set[str]) -> list[str]:
    """Return which of a project's files differ from their digests.

    Raises InputError for one that is missing, or differs and is not among the `editable`.
    """
    changed = []
    for name, digest in digests.items():
        path = project / name
        if not path.is_file():
            raise InputError(f"{path} is missing: export the project again")
        if sha256_file(path) == digest:
            continue
        if name not in editable:
            raise InputError(
                f"{path} was changed since export (its sha256 differs), and results rest on it: export it again"
            )
        changed.append(name)
    return sorted(changed)


def edited(names: list[str]) -> str:
    """Return a line that names edited files, or an empty one."""
    return f"changed since the export: {', '.join(names)}" if names else ""


@contextmanager
def naming(names: list[str]) -> Iterator[None]:
    """Add the edited files to an InputError raised within: they may be why."""
    try:
        yield
    except InputError as error:
        if not names:
            raise
        raise InputError(f"{error}; {edited(names)}") from None


def check_replaceable(out: Path) -> None:
    """Raise InputError if writing to `out` would delete anything but an earlier project of ours and what it built."""

    def own(found: set[str], advice: str) -> set[str]:
        manifest = read_sealed_json(out / MANIFEST, advice)
        files, budgets = manifest.get("files"), [one["name"] for one in manifest.get("budgets", [])]
        if not isinstance(files, dict):
            raise InputError(f"{out / MANIFEST} is not an HLS project's: {advice}")
        work = [name for name in editable_names(found & set(files)) if sha256_file(out / name) != files[name]]
        if work:
            raise InputError(f"{out} holds work of yours ({edited(work)}), which would be lost: {advice}")
        built = {name for name in found if name.endswith((".so", ".o")) or name.startswith("rtl/") or PARTIAL in name}
        return BUILT | set(files) | built | {name for name in found if of_evaluation(name, budgets)}

    require_replaceable(out, "project", MANIFEST, own)


def order_of_outputs(manifest: dict[str, Any]) -> str:
    """Return how the outputs of one token are ordered, in words for a project's README."""
    side = manifest["upscale"]
    return f"[{side}, {side}, C]: pixel by pixel" if manifest["pixels_first"] else f"[C, {side}, {side}]: by channel"
