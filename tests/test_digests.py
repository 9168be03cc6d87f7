"""One property for each carrier of digests: no flipped bit passes in silence."""

import json
import os
import random
import warnings
from pathlib import Path
from typing import Any

import pytest

from m3vit.digests import (
    UncheckedWarning,
    check_listed,
    check_sealed,
    file_digests,
    read_sealed_json,
    read_sealed_lines,
    seal,
    write_sealed_json,
)
from m3vit.errors import InputError

VALUE: dict[str, Any] = {"tasks": ["depth", "semseg"], "mean": [0.485, 1e-7], "top_k": {"depth": 2}, "none": None}


def flips(content: bytes, count: int = 300, seed: int = 0) -> list[bytes]:
    """Return copies of `content`, each with one bit flipped."""
    rng, copies = random.Random(seed), []
    for _ in range(count):
        copy = bytearray(content)
        copy[rng.randrange(len(copy))] ^= 1 << rng.randrange(8)
        copies.append(bytes(copy))
    return copies


def test_json_comes_back_as_written(tmp_path: Path) -> None:
    write_sealed_json(tmp_path / "a.json", VALUE)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert read_sealed_json(tmp_path / "a.json", "a test") == VALUE
    assert list(json.loads((tmp_path / "a.json").read_text())) == [*VALUE, "sha256"]
    write_sealed_json(tmp_path / "a.json", VALUE | {"sha256": "old"})  # of a value that was read with its digest
    assert read_sealed_json(tmp_path / "a.json", "a test") == VALUE


def test_order_of_keys_is_part_of_json(tmp_path: Path) -> None:
    write_sealed_json(tmp_path / "a.json", {"first": 1, "second": 2})
    content = json.loads((tmp_path / "a.json").read_text())
    turned = {key: content[key] for key in ("second", "first", "sha256")}
    (tmp_path / "a.json").write_text(json.dumps(turned))
    with pytest.raises(InputError, match="edited or damaged"):
        read_sealed_json(tmp_path / "a.json", "a test")


def test_no_flipped_bit_of_json_passes(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    write_sealed_json(path, VALUE)
    for copy in flips(path.read_bytes()):
        path.write_bytes(copy)
        with warnings.catch_warnings():
            warnings.simplefilter("error", UncheckedWarning)
            try:
                assert read_sealed_json(path, "a test") == VALUE  # white space
            except (InputError, UncheckedWarning):
                pass


def test_no_flipped_bit_of_a_sealed_file_passes(tmp_path: Path) -> None:
    path, content = tmp_path / "a.bin", random.Random(1).randbytes(500)
    path.write_bytes(content)
    seal(path)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert check_sealed(path, "a test") == len(content)
        for copy in flips(path.read_bytes()):
            path.write_bytes(copy)
            with pytest.raises((InputError, UncheckedWarning)):
                check_sealed(path, "a test")


@pytest.mark.parametrize("edit", [lambda text: text + b"more\n", lambda text: text[:-5], lambda text: b"x" + text])
def test_longer_and_shorter_sealed_files_are_refused(tmp_path: Path, edit: Any) -> None:
    path = tmp_path / "a.bin"
    path.write_bytes(b"content")
    seal(path)
    path.write_bytes(edit(path.read_bytes()))
    with pytest.raises(InputError, match=r"a\.bin is not as it was written.*: a test"):
        check_sealed(path, "a test")


def test_files_without_a_digest_are_read_with_a_warning(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text('{"a": 1}')
    with pytest.warns(UncheckedWarning, match=r"a\.json carries no digest"):
        assert read_sealed_json(tmp_path / "a.json", "a test") == {"a": 1}
    with pytest.warns(UncheckedWarning, match=r"a\.json carries no digest"):
        assert check_sealed(tmp_path / "a.json", "a test") == 8


def test_listed_files(tmp_path: Path) -> None:
    (tmp_path / "one").write_text("1")
    (tmp_path / "two").write_text("2")
    digests = file_digests(tmp_path, ["one", "two"])
    check_listed(tmp_path, digests, "a test")
    (tmp_path / "two").write_text("3")
    with pytest.raises(InputError, match=r"two is not as it was written .*: a test"):
        check_listed(tmp_path, digests, "a test")
    (tmp_path / "one").unlink()
    with pytest.raises(InputError, match="one not found: a test"):
        check_listed(tmp_path, digests, "a test")


def test_missing_and_wrong_files(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "log")
    with pytest.raises(InputError, match=r"log cannot be read \(it is a pipe, not a regular file\): a test"):
        read_sealed_lines(tmp_path / "log", "a test")
    for read in (read_sealed_json, check_sealed):
        with pytest.raises(InputError, match="not found: how to get it"):
            read(tmp_path / "a", "how to get it")  # type: ignore[operator]
    (tmp_path / "list.json").write_text("[1]")
    with pytest.raises(InputError, match="not a JSON object"):
        read_sealed_json(tmp_path / "list.json", "a test")
