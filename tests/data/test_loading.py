"""Batches: their order, and what becomes of files that cannot be read."""

import os
import signal
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.utils.data.dataloader import _MultiProcessingDataLoaderIter

from m3vit.data.loading import EpochBatches, TrainingSet, make_loader
from m3vit.data.network_input import network_input
from m3vit.data.nyud import NYUD
from m3vit.data.sample import Sample
from m3vit.errors import InputError
from m3vit.normalisation import IMAGENET, Normalisation


@pytest.mark.parametrize("pipeline", ["simple", "m3vit", "invpt"])
def test_batches_do_not_depend_on_workers_or_on_where_training_resumed(tiny_data: Path, pipeline: str) -> None:
    def batches(workers: int, start: int) -> list[torch.Tensor]:
        dataset = TrainingSet(NYUD(tiny_data, "train"), (32, 48), 1, IMAGENET, pipeline=pipeline, colour=0.2)
        order = EpochBatches(len(dataset), 3, seed=1)
        order.epoch, order.start = 2, start
        return [batch.images for batch in make_loader(dataset, order, workers)]

    straight = batches(workers=0, start=0)
    assert len(straight) == 3  # ten images, the short batch is dropped
    assert all(torch.equal(a, b) for a, b in zip(straight, batches(workers=2, start=0), strict=True))
    assert all(torch.equal(a, b) for a, b in zip(straight[1:], batches(workers=0, start=1), strict=True))


def test_an_epoch_holds_each_image_once_and_epochs_differ() -> None:
    order = EpochBatches(10, 3, seed=0)
    epochs = []
    for order.epoch in range(2):
        epochs.append([index for batch in order for _, index in batch])
    assert all(len(set(epoch)) == len(epoch) == 9 for epoch in epochs)
    assert epochs[0] != epochs[1]
    with pytest.raises(InputError, match="batch_size 4 is more than the 3 training images"):
        EpochBatches(3, 4, seed=0)


def test_processes_share_every_batch() -> None:
    alone = EpochBatches(10, 4, seed=0)
    shares = [EpochBatches(10, 4, seed=0, rank=rank, processes=2) for rank in range(2)]
    for order in (alone, *shares):
        order.epoch, order.start = 3, 1
    assert [a + b for a, b in zip(*shares, strict=True)] == list(alone)
    with pytest.raises(InputError, match="give a multiple of their number, 3"):
        EpochBatches(10, 4, seed=0, rank=0, processes=3)


def test_a_cache_without_room_reads_again_and_says_so_once(tiny_data: Path) -> None:
    """Photographs of 480 x 640 with their labels are 6.4 MB each: a machine may not hold them all."""
    split = NYUD(tiny_data, "train")
    plain, cached = (TrainingSet(split, (32, 48), 0, IMAGENET, cache=cache) for cache in (False, True))
    assert 0 < cached.room < os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    cached.room = 2.5 * 32 * 48 * (3 + 1 + 4 + 12 + 1)
    with pytest.warns(UserWarning, match="^data.cache keeps 2 of 10 training images") as said:
        for epoch in range(2):
            for index in range(4):
                (image, _), (again, _) = plain[epoch, index], cached[epoch, index]
                assert torch.equal(image, again)
    assert len(said) == 1 and sorted(cached.cache or ()) == [0, 1]


def test_cached_samples_give_the_same_batches(tiny_data: Path) -> None:
    split = NYUD(tiny_data, "train")
    plain, cached = (TrainingSet(split, (32, 48), 0, IMAGENET, "m3vit", cache=cache) for cache in (False, True))
    for epoch in range(3):
        for index in range(4):
            (image, labels), (again, others) = plain[epoch, index], cached[epoch, index]
            assert torch.equal(image, again)
            assert all(torch.equal(labels[task], others[task]) for task in labels)


@pytest.mark.parametrize("workers", [0, 1])
def test_unreadable_files_are_left_out_and_named(make_data: Callable[..., Path], tmp_path: Path, workers: int) -> None:
    root = make_data(tmp_path / "data", train=4)
    (root / "depth" / "0001.npy").write_bytes(b"")
    for name in ("0002", "0003"):
        (root / "images" / f"{name}.jpg").write_bytes(b"\xff\xd8 no picture")
    dataset = TrainingSet(NYUD(root, "train"), (32, 48), 0, IMAGENET)
    loader = make_loader(dataset, EpochBatches(4, 2, seed=0), workers)
    images, errors = 0, []
    for batch in loader:
        images += 0 if batch.images is None else len(batch.images)
        errors += batch.errors
        assert all(len(label) == len(batch.images) for label in batch.labels.values())
    assert images == 1
    assert sorted(Path(error.split()[0]).name for error in errors) == ["0001.npy", "0002.jpg", "0003.jpg"]


class Local(Exception):  # noqa: N818
    """Cannot be pickled."""

    def __init__(self, one: int, other: int) -> None:
        self.function = lambda: one + other


class Failing(NYUD):
    """Fails at one image, for no fault of its file."""

    way = ""

    def load(self, index: int) -> Sample:
        if index == 2 and self.way == "killed":
            os.kill(os.getpid(), signal.SIGKILL)
        if index == 2 and self.way == "bus error":
            os.kill(os.getpid(), signal.SIGBUS)
        if index == 2 and self.way == "exit":
            os._exit(3)
        if index == 2:
            raise {"memory": MemoryError(), "disk": OSError(5, "Input/output error"), "local": Local(1, 2)}[self.way]
        return super().load(index)


@pytest.mark.parametrize(
    ("way", "words"),
    [
        ("memory", "failed: MemoryError."),
        ("disk", "failed: OSError: Input/output error."),
        ("local", "failed: Local: (1, 2)."),
        ("killed", "was killed by SIGKILL, maybe for want of memory."),
        ("bus error", "was killed by SIGBUS, as when /dev/shm is full."),
        ("exit", "ended with exit code 3."),
    ],
)
def test_what_fails_in_a_loader_process_is_the_last_batch(
    tiny_data: Path, way: str, words: str, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    # Torch looks every 5 s whether its processes live.
    monkeypatch.setattr(_MultiProcessingDataLoaderIter._try_get_data, "__defaults__", (0.2,))
    split = Failing(tiny_data, "train")
    split.way = way
    *_, last = make_loader(TrainingSet(split, (32, 48), 0, IMAGENET), EpochBatches(10, 2, seed=0), workers=2)
    assert words in last.failure and "or 0 (the training process loads)" in last.failure and "\n" not in last.failure
    assert last.images is None and not last.errors
    assert "Traceback" not in "".join(capfd.readouterr())


def test_a_handler_of_ended_children_stays_the_caller_s(tiny_data: Path) -> None:
    """torch puts its own in its place when loader processes start."""

    def handler(*_: object) -> None:
        pass

    before = signal.signal(signal.SIGCHLD, handler)
    try:
        dataset = TrainingSet(NYUD(tiny_data, "train"), (32, 48), 0, IMAGENET)
        for batch in make_loader(dataset, EpochBatches(len(dataset), 2, seed=0), workers=1):
            assert not batch.failure and signal.getsignal(signal.SIGCHLD) is handler
    finally:
        signal.signal(signal.SIGCHLD, before)


def test_without_loader_processes_a_defect_keeps_its_traceback(tiny_data: Path) -> None:
    split = Failing(tiny_data, "train")
    split.way = "disk"
    with pytest.raises(OSError, match="Input/output"):
        list(make_loader(TrainingSet(split, (32, 48), 0, IMAGENET), EpochBatches(10, 2, seed=0), workers=0))


def test_normalisation() -> None:
    white = np.full((32, 48, 3), 255, np.uint8)
    # (1 - mean) / std of ImageNet, channel by channel
    expected = [(1 - 0.485) / 0.229, (1 - 0.456) / 0.224, (1 - 0.406) / 0.225]
    found = network_input(white, (16, 24), IMAGENET).mean(dim=(1, 2)).tolist()
    assert found == pytest.approx(expected, rel=1e-5)
    half = Normalisation((0.5, 0.5, 0.5), (0.5, 0.5, 0.25))
    assert network_input(white, (16, 24), half).mean(dim=(1, 2)).tolist() == pytest.approx([1, 1, 2])
