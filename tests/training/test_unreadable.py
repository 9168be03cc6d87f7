"""A damaged file stops training with its name, or is left out and counted; never a stack trace."""

import json
import resource
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.conftest import TINY
from tests.test_cli import refused

Cli = Callable[..., subprocess.CompletedProcess]


@pytest.fixture
def damaged(make_data: Callable[..., Path], tmp_path: Path) -> Path:
    root = make_data(tmp_path / "data")
    label = root / "normals" / "0004.npy"
    label.write_bytes(label.read_bytes()[:-7])
    (root / "images" / "0011.jpg").write_bytes(b"")  # of val
    return root


@pytest.mark.parametrize("workers", [0, 2])
def test_training_stops_with_the_file_named(cli: Cli, damaged: Path, tmp_path: Path, workers: int) -> None:
    words = ["synthetic-tiny", *TINY, f"--data.root={damaged}", f"--data.workers={workers}", "--data.cache=false"]
    result = cli("train", *words, "--train.epochs=3", "--out", tmp_path / "run")
    refused(result, r"0004\.npy", "--data.on_error skip")


def test_training_ends_with_a_loader_process_that_cannot_hand_over_what_it_read(
    process: Cli, tiny_data: Path, tmp_path: Path
) -> None:
    def limit() -> None:  # as on a full /dev/shm, and a full disk
        resource.setrlimit(resource.RLIMIT_FSIZE, (50 << 10, 50 << 10))

    words = ["synthetic-tiny", *TINY, f"--data.root={tiny_data}", "--data.workers=2", "--data.cache=false"]
    result = process("train", *words, "--train.epochs=1", "--out", tmp_path / "run", preexec_fn=limit, timeout=120)
    refused(
        result, "a process that loads data failed: .*File too large", r"state\.pt cannot be written \(File too large\)"
    )


def test_nothing_to_train_on_is_an_error(cli: Cli, damaged: Path, tmp_path: Path) -> None:
    for image in (damaged / "images").iterdir():
        image.write_bytes(b"")
    words = ["synthetic-tiny", *TINY, f"--data.root={damaged}", "--data.on_error=skip"]
    refused(cli("train", *words, "--out", tmp_path / "run"), "not one image of the epoch could be read")


def test_val_images_in_the_train_list_are_refused(cli: Cli, make_data: Callable[..., Path], tmp_path: Path) -> None:
    root = make_data(tmp_path / "leaky")
    with open(root / "gt_sets" / "train.txt", "a") as file:
        file.write("0011\n")
    words = ["synthetic-tiny", *TINY, f"--data.root={root}"]
    refused(cli("train", *words, "--out", tmp_path / "run"), "lists 1 images in train and in val, such as 0011")


def test_training_goes_on_without_them_and_counts(cli: Cli, damaged: Path, tmp_path: Path) -> None:
    (damaged / "images" / "0005.jpg").write_bytes(b"")
    (damaged / "depth" / "0010.npy").unlink()  # of val
    run = tmp_path / "run"
    words = ["synthetic-tiny", *TINY, f"--data.root={damaged}", "--data.on_error=skip", "--train.epochs=3"]
    result = cli("train", *words, "--out", run)
    assert result.returncode == 0, result.stderr
    assert "1 training images could not be read and were left out" in result.stdout
    assert "images trained on without them: normals 1:" in result.stdout
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    (unreadable,) = [line for line in lines if line["kind"] == "unreadable"]
    assert unreadable["count"] == 1 and "0005.jpg" in unreadable["message"]
    (unlabelled,) = [line for line in lines if line["kind"] == "unlabelled"]
    assert unlabelled["normals"] == 1 and "0004.npy" in unlabelled["message"]
    (val,) = [line for line in lines if line["kind"] == "val"]
    assert val["unreadable"] == 1 and val["unlabelled/depth"] == 1 and val["protocol"] == "A"
    # A score over fewer images than the split has would mean something else.
    refused(cli("eval", run), r"depth/0010\.npy not found")
