"""Files of HLS projects: protected ones are refused when changed, editable ones named; no flipped bit passes."""

import json
import shutil
import subprocess
import warnings
from pathlib import Path
from typing import Any

import pytest

from m3vit.digests import UncheckedWarning
from m3vit.errors import InputError
from m3vit.evaluation.artefacts import open_predictor
from m3vit.export.hls.contents import CLASSES, check_contents, may_edit, open_project
from m3vit.export.hls.project import export_project
from m3vit.hw.manifest import MANIFEST, read_manifest
from m3vit.hw.sim import csim
from m3vit.models.multitask import MultiTaskModel
from tests.command_line import kept_state
from tests.export.models import make_images, make_samples
from tests.test_digests import flips

pytestmark = pytest.mark.slow

FLIPS = 200  # of each file, or of each kind of file
# Of many files of one kind, each flip takes another.
KINDS = ("firmware/weights/*.txt", "firmware/weights/*.h", "tb_data/*.dat")
EDITS = {
    "spatial": {
        "project.tcl": ("clock_period 5", "clock_period 6"),
        "firmware/m3vit.cpp": ("#pragma HLS INTERFACE axis", "#pragma HLS INTERFACE axis register"),
        "firmware/nnet_utils/m3vit_gelu.h": ("#pragma HLS PIPELINE", "#pragma HLS PIPELINE II=2"),
        "README.md": ("never synthesised", "synthesised by us"),
    },
    "multiplexed": {
        "project.tcl": ("clock_period 3.333", "clock_period 6.667"),
        "firmware/parameters.h": ("tile_out = ", "tile_out = 0 + "),
        "Makefile": ("-O3", "-O1"),
        "host/m3vit_driver.py": ("timeout_s: float = 10.0", "timeout_s: float = 1.0"),
    },
}


def export(model: MultiTaskModel, out: Path, schedule: str) -> None:
    export_project(model, out, calibration=make_images(4, seed=9), samples=make_samples(), schedule=schedule)


@pytest.fixture(scope="module")
def projects(model: MultiTaskModel, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A project of each schedule; read only."""
    root = tmp_path_factory.mktemp("projects")
    for schedule in EDITS:
        export(model, root / schedule, schedule)
    return {schedule: root / schedule for schedule in EDITS}


@pytest.fixture(params=list(EDITS))
def schedule(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def project(projects: dict[str, Path], schedule: str, tmp_path: Path) -> Path:
    """A copy, to spoil."""
    return Path(shutil.copytree(projects[schedule], tmp_path / "project"))


def edit(project: Path, name: str, old: str, new: str) -> None:
    text = (project / name).read_text()
    assert old in text, name
    (project / name).write_text(text.replace(old, new, 1))


def refused(project: Path, name: str, content: bytes, manifest: dict[str, Any]) -> bool:
    """Return whether a project with this content of a file is refused; if not, it must be read as it was."""
    kept = (project / name).read_bytes()
    (project / name).write_bytes(content)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", UncheckedWarning)
            assert open_project(project) == (manifest, [])
    except (InputError, UncheckedWarning):
        return True
    finally:
        (project / name).write_bytes(kept)
    return False


def test_no_flipped_bit_of_a_protected_file_passes(project: Path) -> None:
    manifest, changed = open_project(project)
    assert changed == []
    protected = {name: digest for name, digest in manifest["files"].items() if name not in manifest["editable"]}
    kinds = [sorted(str(path.relative_to(project)) for path in project.glob(kind)) for kind in KINDS]
    kinds += [[name] for name in protected if not any(name in kind for kind in kinds)]
    for kind in kinds:
        for number in range(FLIPS if kind else 0):
            name = kind[number % len(kind)]
            (copy,) = flips((project / name).read_bytes(), 1, seed=number)
            assert refused_alone(project, name, copy, protected[name]), name
    for copy in flips((project / MANIFEST).read_bytes(), FLIPS):
        refused(project, MANIFEST, copy, manifest)  # or the same: white space


def refused_alone(project: Path, name: str, content: bytes, digest: str) -> bool:
    """Return whether this content of a file is refused, in a project whose other files are not looked at."""
    kept = (project / name).read_bytes()
    (project / name).write_bytes(content)
    try:
        check_contents(project, {name: digest}, set())
    except InputError as error:
        assert name in str(error)
        return True
    finally:
        (project / name).write_bytes(kept)
    return False


def test_a_damaged_manifest_without_a_seal_is_refused_or_read_with_a_warning(project: Path) -> None:
    """As older projects have them: nothing tells an edit, but none ends in a stack trace."""
    manifest = json.loads((project / MANIFEST).read_text())
    for name in ("sha256", "editable"):
        manifest.pop(name)
    content = json.dumps(manifest, indent=2).encode()
    (project / MANIFEST).write_bytes(content)
    with pytest.warns(UncheckedWarning, match=r"m3vit\.json carries no digest"):
        assert open_project(project) == (manifest, [])
    edit(project, *("project.tcl", *EDITS[manifest["schedule"]]["project.tcl"]))
    with pytest.warns(UncheckedWarning):
        assert open_project(project)[1] == ["project.tcl"]
    for copy in flips(content, 5 * FLIPS):
        (project / MANIFEST).write_bytes(copy)
        with kept_state(), warnings.catch_warnings():  # a name that was flipped is of classes that no other test has
            warnings.simplefilter("ignore", UncheckedWarning)
            try:
                read_manifest(project)
            except InputError:
                pass


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("output_fracs", [14, 14]),
        ("output_fracs", None),
        ("output_layout", {"token_pitch": 4}),
        ("output_layout", {"token_pitch": 4, "pixels": 1, "pixel_outputs": [4, 8], "pixel_pitches": [4, 8]}),
        ("grid", [3]),
        ("grid", [4, 3]),
        ("tasks", []),
        ("tasks", {}),
        ("tokens", True),
        ("label_set", "cityscapes"),
        ("schedule", "both"),
        ("files", {}),
        ("files", {"../../etc/passwd": "0" * 64}),
        ("moe_layers", [{"experts": 4, "top_k": 5}]),
        ("hls4ml", 1),
        ("format", 1),
    ],
)
def test_manifests_that_contradict_themselves(projects: dict[str, Path], tmp_path: Path, key: str, value: Any) -> None:
    manifest = json.loads((projects["multiplexed"] / MANIFEST).read_text())
    manifest.pop("sha256")
    for change in ({**manifest, key: value}, {name: one for name, one in manifest.items() if name != key}):
        if key in ("schedule", "output_layout") and key not in change:  # as of older projects
            continue
        (tmp_path / MANIFEST).write_text(json.dumps(change))
        with pytest.warns(UncheckedWarning), pytest.raises(InputError, match=r"m3vit\.json is .*export"):
            read_manifest(tmp_path)


def test_edits_are_named_and_do_not_hinder(project: Path, schedule: str) -> None:
    for name, (old, new) in EDITS[schedule].items():
        edit(project, name, old, new)
    assert open_project(project)[1] == sorted(EDITS[schedule])
    if schedule == "multiplexed":  # a spatial one would be built
        _, info, _ = open_predictor(project, "cpu", 1)
        assert info["changed_files"] == sorted(EDITS[schedule])


def test_protected_and_missing_files_are_refused(project: Path, schedule: str) -> None:
    formats = "firmware/defines.h" if schedule == "spatial" else "firmware/model.h"
    (weights,) = sorted((project / "firmware" / "weights").iterdir())[:1]
    for name in (formats, "tb_data/samples.npz", "hls4ml_config.yml", str(weights.relative_to(project))):
        with open(project / name, "ab") as file:
            file.write(b"\n")
        with pytest.raises(InputError, match=f"{Path(name).name} was changed since export .*: export it again"):
            open_project(project)
        shutil.move(project / name, project / "aside")
        with pytest.raises(InputError, match=f"{Path(name).name} is missing: export the project again"):
            open_project(project)
        (project / name).write_bytes((project / "aside").read_bytes()[:-1])
    assert open_project(project)[1] == []


def test_every_file_has_a_class_that_is_told(project: Path, schedule: str) -> None:
    manifest, _ = open_project(project)
    assert manifest["editable"] == sorted(name for name in manifest["files"] if may_edit(name))
    found = {str(path.relative_to(project)) for path in project.rglob("*") if path.is_file()}
    assert found == {*manifest["files"], MANIFEST}
    assert not any(name.startswith(("tb_data/", "firmware/weights/")) for name in manifest["editable"])
    readme = (project / "README.md").read_text()
    assert "## Changing it" in readme and {"spatial": "defines.h", "multiplexed": "model.h"}[schedule] in readme
    assert CLASSES[-1][:2] == ("*", False)


def test_an_edited_project_is_not_exported_over(project: Path, schedule: str, model: MultiTaskModel) -> None:
    edit(project, "project.tcl", *EDITS[schedule]["project.tcl"])
    with pytest.raises(InputError, match=r"holds work of yours \(changed since the export: project\.tcl\)"):
        export(model, project, schedule)
    assert open_project(project)[1] == ["project.tcl"]
    edit(project, "project.tcl", *reversed(EDITS[schedule]["project.tcl"]))
    (project / "tb_data" / "samples.npz").write_bytes(b"damaged")  # which is what an export mends
    export(model, project, schedule)
    assert open_project(project)[1] == []


@pytest.mark.parametrize(
    "name", ['a "quote"', "$HOME #1 %s 'x'", "back\\slash\\n", "line\nbreak\n", "ü ??= é", "d" * 200]
)
def test_hls4mls_build_takes_a_folder_of_any_name(
    projects: dict[str, Path], schedule: str, tmp_path: Path, name: str
) -> None:
    """What build_lib.sh gives the compiler as WEIGHTS_DIR is a string of C++ that is this folder's path."""
    odd = tmp_path / name
    odd.mkdir()
    shutil.copy(projects[schedule] / "build_lib.sh", odd)
    (odd / "firmware").mkdir()
    fake = tmp_path / "bin" / "g++"
    fake.parent.mkdir()
    loop = f'for word; do case "$word" in WEIGHTS_DIR=*) printf "%s" "$word" > "{tmp_path}/define";; esac; done'
    fake.write_text(f"#!/bin/sh\n{loop}\n")
    fake.chmod(0o755)
    subprocess.run(["./build_lib.sh"], cwd=odd, env={"PATH": f"{fake.parent}:/usr/bin:/bin"}, check=True)
    source = "#include <cstdio>\nint main() { fputs(WEIGHTS_DIR, stdout); }\n"
    (tmp_path / "main.cpp").write_text(source)
    define = (tmp_path / "define").read_text()
    command = [csim.find_compiler(), "-std=c++11", "-D", define, "main.cpp", "-o", "main"]
    subprocess.run(command, cwd=tmp_path, check=True)
    printed = subprocess.run([tmp_path / "main"], capture_output=True, text=True, check=True).stdout
    assert printed == f"{odd.resolve()}/firmware/weights"
