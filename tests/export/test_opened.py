"""Packages and caches that change: found by their digests, whenever it happens; never another package's numbers."""

import os
import random
import shutil
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from m3vit.digests import UncheckedWarning, read_sealed_json, write_sealed_json
from m3vit.errors import InputError
from m3vit.export.runtime.manifest import MANIFEST, file_entries
from m3vit.export.runtime.package import Package, PackageChanged
from m3vit.files import sha256_file
from m3vit.staging import LOCK, PARTIAL

pytestmark = pytest.mark.slow

IMAGE = np.random.default_rng(0).integers(0, 256, (32, 48, 3), dtype=np.uint8)
FLIPS = 200  # of each file
REPLACED = "was replaced or changed since it was opened: load it again"


@pytest.fixture
def package(onnx_package: Path, tmp_path: Path) -> Path:
    """A copy to change."""
    return Path(shutil.copytree(onnx_package, tmp_path / "package"))


def other_weights(folder: Path) -> bytes:
    """Weights of the same layout that predict something else."""
    values = np.fromfile(folder / "weights.bin", np.float32)
    return np.where(np.abs(values) < 10, values * np.float32(1.05), values).tobytes()


def make_other(package: Path, other: Path) -> Path:
    """A whole package, under valid digests, of the same model with other weights."""
    shutil.copytree(package, other)
    (other / "weights.bin").write_bytes(other_weights(package))
    manifest = read_sealed_json(other / MANIFEST, "")
    manifest["weights"]["sha256"] = sha256_file(other / "weights.bin")
    write_sealed_json(other / MANIFEST, manifest)
    return other


def predict(package: Path, **options: Any) -> Any:
    return Package.load(package, threads=1, **options).predict(IMAGE, "depth")


# ------------------------------------------------------------------------------------------------------ flipped bits


@contextmanager
def flipped(path: Path, chance: random.Random) -> Iterator[None]:
    """One bit of a file is another."""
    whole = path.read_bytes()
    damaged = bytearray(whole)
    damaged[chance.randrange(len(damaged))] ^= 1 << chance.randrange(8)
    path.write_bytes(damaged)
    try:
        yield
    finally:
        path.write_bytes(whole)


def test_a_flipped_bit_of_a_package_is_refused_or_changes_nothing(package: Path) -> None:
    chance, expected, refused = random.Random(0), predict(package), 0
    files = sorted(package.iterdir())
    assert {path.suffix for path in files} == {".onnx", ".bin", ".json"}
    for path in files:
        for _ in range(FLIPS):
            with flipped(path, chance), warnings.catch_warnings():
                warnings.simplefilter("ignore", UncheckedWarning)  # of the manifest's key of the digest
                try:
                    found = predict(package)
                except InputError:
                    refused += 1
                    continue
                assert path.name == MANIFEST, f"a changed {path.name} was run"
                np.testing.assert_array_equal(found, expected)
    assert refused > 0.9 * FLIPS * len(files)  # a manifest has spaces that mean nothing


def test_a_flipped_bit_of_a_cache_is_never_run(package: Path, tmp_path: Path) -> None:
    chance, cache = random.Random(1), tmp_path / "cache"
    expected = predict(package, cache=cache)
    (home,) = cache.iterdir()
    opened = Package.load(package, threads=1, cache=cache)
    entry, sessions = opened.entry("depth")["graphs"]["fp32"], opened._sessions
    made_for = sessions.made_for(entry)
    assert sessions.open_entry(home, entry, made_for) is not None
    for path in sorted(home.iterdir()):
        for number in range(FLIPS):
            with flipped(path, chance):
                assert sessions.open_entry(home, entry, made_for) is None or path.name == "entry.json"
                if number % 50 == 0:  # the whole way: the entry is made anew
                    np.testing.assert_array_equal(predict(package, cache=cache), expected)
                    assert sessions.open_entry(home, entry, made_for) is not None
        shutil.rmtree(home)
        np.testing.assert_array_equal(predict(package, cache=cache), expected)
    assert [path.name for path in cache.iterdir()] == [home.name]  # nothing of the damaged ones is left


# ---------------------------------------------------------------------------------------------------------- replaced


def test_tasks_loaded_after_a_replacement_are_of_the_package_opened(package: Path, tmp_path: Path) -> None:
    other = make_other(package, tmp_path / "other")
    expected, new = predict(package), predict(other)
    assert not np.array_equal(expected, new)
    opened = Package.load(package, threads=1)
    edges = opened.predict(IMAGE, "edge")
    aside = package.rename(tmp_path / "old")  # as m3vit export onnx does
    other.rename(package)
    np.testing.assert_array_equal(opened.predict(IMAGE, "depth"), expected)
    np.testing.assert_array_equal(Package.load(package, threads=1).predict(IMAGE, "depth"), new)
    shutil.rmtree(aside)
    np.testing.assert_array_equal(opened.predict(IMAGE, "edge"), edges)  # in use: nothing of it is lost
    with pytest.raises(PackageChanged, match=REPLACED):
        opened.predict(IMAGE, "normals")


@pytest.mark.parametrize("verify", [True, False])
@pytest.mark.parametrize("name", ["weights.bin", "depth.onnx"])
@pytest.mark.parametrize("way", ["in place", "renamed", "gone"])
def test_files_changed_after_opening_are_refused(package: Path, name: str, way: str, verify: bool) -> None:
    path = package / name
    content = other_weights(package) if name == "weights.bin" else (package / "edge.onnx").read_bytes()
    opened = Package.load(package, threads=1, verify=verify)
    if way != "in place":
        path.unlink()
    if way != "gone":
        path.write_bytes(content)
    with pytest.raises(InputError, match=f"{name} {REPLACED}"):
        opened.predict(IMAGE, "depth")


@pytest.mark.parametrize("low_memory", [True, False])
def test_weights_overwritten_under_a_graph_in_use(package: Path, low_memory: bool) -> None:
    path = package / "weights.bin"
    opened = Package.load(package, threads=1, low_memory=low_memory)
    expected = opened.predict(IMAGE, "depth")
    whole, damaged = path.read_bytes(), other_weights(package)
    path.touch()
    np.testing.assert_array_equal(opened.predict(IMAGE, "depth"), expected)  # the same content
    with open(path, "r+b") as file:
        file.write(damaged)
    with pytest.raises(InputError, match=f"weights.bin {REPLACED}"):
        opened.predict(IMAGE, "depth")
    with open(path, "r+b") as file:
        file.write(whole)
    np.testing.assert_array_equal(opened.predict(IMAGE, "depth"), expected)
    path.rename(package / "old")
    path.write_bytes(damaged)
    np.testing.assert_array_equal(opened.predict(IMAGE, "depth"), expected)  # what is mapped has only lost its name


def test_copies_and_links_are_no_change(package: Path, tmp_path: Path) -> None:
    expected, opened = predict(package), Package.load(package, threads=1)
    for path in list(package.iterdir()):
        shutil.copy(path, tmp_path / "copy")
        os.replace(tmp_path / "copy", path)
        os.link(path, tmp_path / f"backup of {path.name}")
    np.testing.assert_array_equal(opened.predict(IMAGE, "depth"), expected)


@pytest.mark.parametrize("name", [MANIFEST, "weights.bin", "depth.onnx"])
def test_links_to_what_is_no_file(package: Path, name: str, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo")
    for target in (tmp_path / "fifo", Path("/dev/zero"), tmp_path):
        (package / name).unlink()
        (package / name).symlink_to(target)
        with pytest.raises((InputError, OSError)):
            Package.load(package)


# --------------------------------------------------------------------------------------------------------- manifests


@pytest.mark.parametrize(
    "change",
    [
        lambda text: text.replace("0.485", "0.486", 1),
        lambda text: text.replace('"decode": "sigmoid"', '"decode": "identity"', 1),
        lambda text: text.replace('"run": {', '"run": {"note": 1, ', 1),
    ],
)
def test_an_edited_manifest_is_refused(package: Path, change: Callable[[str], str]) -> None:
    path = package / MANIFEST
    text = path.read_text()
    path.write_text(change(text))
    assert path.read_text() != text
    with pytest.raises(InputError, match=r"manifest.json is not as it was written .* export it again"):
        Package.load(package, verify=False)


def test_a_manifest_without_a_digest_is_read_with_a_warning(package: Path) -> None:
    expected, path = predict(package), package / MANIFEST
    path.write_text(path.read_text().replace('"sha256": "' + path.read_text().rsplit('"', 2)[1], '"was": "', 1))
    with pytest.warns(UncheckedWarning, match=r"manifest.json carries no digest"):
        np.testing.assert_array_equal(predict(package), expected)


@pytest.mark.parametrize("parity", [{"passed": False}, {}, {"passed": 1}, [], True])
def test_a_package_that_failed_its_comparison_is_refused(package: Path, parity: Any) -> None:
    manifest = read_sealed_json(package / MANIFEST, "")
    write_sealed_json(package / MANIFEST, {**manifest, "parity": parity})
    with pytest.raises(InputError, match="did not pass the comparison with the model"):
        Package.load(package)
    del manifest["parity"]  # made with export_package alone
    write_sealed_json(package / MANIFEST, manifest)
    Package.load(package)


def test_one_file_cannot_have_two_digests(package: Path) -> None:
    manifest = read_sealed_json(package / MANIFEST, "")
    graphs = manifest["tasks"]["depth"]["graphs"]["fp32"]
    manifest["tasks"]["edge"]["graphs"]["fp32"] = {**graphs, "sha256": "0" * 64}
    write_sealed_json(package / MANIFEST, manifest)
    assert len(file_entries(manifest)) > len({entry["file"] for entry in file_entries(manifest)})
    with pytest.raises(InputError, match="is damaged"):
        Package.load(package)


# ------------------------------------------------------------------------------------------------------------ caches


def test_an_entry_of_another_package_is_not_taken(package: Path, tmp_path: Path) -> None:
    other, cache = make_other(package, tmp_path / "other"), tmp_path / "cache"
    expected, new = predict(package, cache=cache), predict(other, cache=cache)
    first, second = sorted(cache.iterdir())
    swap = first.rename(tmp_path / "swap")
    second.rename(first)
    swap.rename(second)
    np.testing.assert_array_equal(predict(package, cache=cache), expected)
    np.testing.assert_array_equal(predict(other, cache=cache), new)


@pytest.mark.parametrize("what", ["a file", "nothing in it", "a missing file", "a file too many", "a link"])
def test_entries_that_are_something_else_are_made_anew(package: Path, tmp_path: Path, what: str) -> None:
    cache = tmp_path / "cache"
    expected = predict(package, cache=cache)
    (home,) = cache.iterdir()
    left = cache / f".{home.name}.killed{PARTIAL}"
    shutil.copytree(home, left)
    left.with_name(left.name + LOCK).write_text(home.name)
    if what == "a missing file":
        (home / "weights.bin").unlink()
    elif what == "a file too many":
        (home / "more.bin").write_bytes(b"")
    else:
        shutil.rmtree(home)
        if what == "a file":
            home.write_text("")
        elif what == "a link":
            home.symlink_to(package)
        else:
            home.mkdir()
    np.testing.assert_array_equal(predict(package, cache=cache), expected)
    assert [path.name for path in cache.iterdir()] == [home.name], "what a killed process left is gone too"
    assert (package / MANIFEST).is_file()
    times = {path.name: path.stat().st_mtime_ns for path in home.iterdir()}
    predict(package, cache=cache)
    assert times == {path.name: path.stat().st_mtime_ns for path in home.iterdir()}


def test_a_cache_is_not_made_of_files_that_nobody_verified(package: Path, tmp_path: Path) -> None:
    whole = (package / "weights.bin").read_bytes()
    expected = predict(package)
    (package / "weights.bin").write_bytes(other_weights(package))
    with pytest.raises(InputError, match=r"weights\.bin"):
        predict(package, cache=tmp_path / "cache", verify=False)
    (package / "weights.bin").write_bytes(whole)
    np.testing.assert_array_equal(predict(package, cache=tmp_path / "cache"), expected)


def test_a_cache_that_cannot_be_written_is_what_the_message_blames(package: Path, tmp_path: Path) -> None:
    program = (
        "import resource, sys; from m3vit.errors import InputError; from m3vit.export.runtime.package import Package\n"
        "import numpy as np; image = np.zeros((32, 48, 3), np.uint8)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))\n"
        "try: Package.load(sys.argv[1], threads=1, cache=sys.argv[2]).predict(image, 'depth')\n"
        "except (InputError, OSError) as error: print(error)\n"
    )
    words = [sys.executable, "-c", program, str(package), str(tmp_path / "cache")]
    done = subprocess.run(words, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0 and "Traceback" not in done.stderr, done.stderr
    assert "cache" in done.stdout and "export the package again" not in done.stdout
    assert list((tmp_path / "cache").iterdir()) == []


def test_processes_that_make_the_same_entry_at_once(package: Path, tmp_path: Path) -> None:
    program = (
        "import sys, time, hashlib; import numpy as np; from m3vit.export.runtime.package import Package\n"
        "image = np.load(sys.argv[3]); print('ready', flush=True); sys.stdin.readline()\n"
        "for _ in range(5): found = Package.load(sys.argv[1], threads=1, cache=sys.argv[2]).predict(image, 'depth')\n"
        "print(hashlib.sha256(found.tobytes()).hexdigest())\n"
    )
    np.save(tmp_path / "image.npy", IMAGE)
    cache = tmp_path / "cache"
    words = [sys.executable, "-c", program, str(package), str(cache), str(tmp_path / "image.npy")]
    pipes: dict[str, Any] = dict(stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    workers = [subprocess.Popen(words, **pipes) for _ in range(3)]
    for worker in workers:
        assert worker.stdout is not None and worker.stdout.readline() == "ready\n"
    for worker in workers:
        assert worker.stdin is not None
        worker.stdin.write("\n")
        worker.stdin.flush()
    for home in _entries(cache):  # and damage it while they are at it
        (tmp_path / "damaged").write_bytes(b"damaged")
        os.replace(tmp_path / "damaged", home / "weights.bin")
    answers = {worker.communicate(timeout=120)[0] for worker in workers}
    assert {worker.returncode for worker in workers} == {0} and len(answers) == 1, answers
    (home,) = cache.iterdir()
    np.testing.assert_array_equal(predict(package, cache=cache), predict(package))


def _entries(cache: Path) -> list[Path]:
    """Wait for the first entry of a cache."""
    for _ in range(600):
        if found := [path for path in cache.glob("*") if (path / "weights.bin").is_file() and path.name[0] != "."]:
            return found
        time.sleep(0.05)
    return []
