"""Heads and experts in threads: the same words and counts, and torch as it was."""

import os
import signal
import threading
import time
from collections.abc import Iterator

import numpy as np
import pytest
import torch

from m3vit.hw.isa import Attention, Experts
from m3vit.hw.sim import threads
from m3vit.hw.sim.emulator import Emulator
from m3vit.hw.sim.threads import each
from tests.hw.programs import Shape, frames_of, random_vit


@pytest.fixture(autouse=True)
def small_operations(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Give threads even these; torch is as it was in the end."""
    monkeypatch.setattr(threads, "GRAIN", 0)
    threads_before = torch.get_num_threads()
    yield
    torch.set_num_threads(threads_before)


@pytest.mark.parametrize("formats", [{"weight_bits": 8, "act_bits": 8}, {}])
def test_words_and_counts_are_those_of_one_thread(formats: dict[str, int]) -> None:
    """Values are beyond their formats in attention and experts alike, whose threads count at once."""
    shape = Shape(grid=(6, 9), depth=4, finer=4, wide_frac=28, **formats)
    image, _ = random_vit(shape)
    (frame,) = frames_of(shape, 1)
    emulator = Emulator(image)
    kinds, expected = set(), []
    for count in (1, 2, 5):
        torch.set_num_threads(count)
        for _ in range(1 if count == 1 else 5):
            found = [emulator.run(frame, task) for task in range(shape.tasks)]
            assert torch.get_num_threads() == count
            expected = expected or found
            for one, other in zip(expected, found, strict=True):
                np.testing.assert_array_equal(one.outputs, other.outputs)
                for ids, others in zip(one.expert_ids, other.expert_ids, strict=True):
                    np.testing.assert_array_equal(ids, others)
                assert one.saturated == other.saturated
                kinds |= {type(emulator.program[pc]) for pc in one.saturated}
    assert {Attention, Experts} <= kinds


def test_no_count_is_lost_between_threads() -> None:
    class Slow(dict[int, int]):
        def get(self, pc: int, default: int = 0) -> int:  # type: ignore[override]
            found = super().get(pc, default)
            time.sleep(1e-3)
            return found

    shape = Shape()
    state = Emulator(random_vit(shape)[0]).state_after(frames_of(shape, 1)[0], 0, 0)
    state.saturated = Slow()
    torch.set_num_threads(4)
    each(lambda place: state.add_saturated(0, 1), 16, 1)
    assert state.saturated == {0: 16}


def test_threads_have_one_of_torchs_each_and_are_at_work_together() -> None:
    torch.set_num_threads(3)
    meeting = threading.Barrier(3, timeout=60)

    def meet(place: int) -> tuple[int, int, bool]:
        meeting.wait()
        return place, torch.get_num_threads(), torch.is_inference_mode_enabled()

    assert each(meet, 3, 1) == [(place, 1, True) for place in range(3)]
    assert torch.get_num_threads() == 3


def test_short_operations_stay_in_the_thread_that_asks(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.set_num_threads(2)
    monkeypatch.setattr(threads, "GRAIN", 100)
    found = [set(each(lambda place: threading.get_ident(), 8, size)) for size in (99, 100)]
    assert found[0] == {threading.get_ident()} and threading.get_ident() not in found[1]


def test_what_goes_wrong_is_told_and_torch_is_as_it_was() -> None:
    torch.set_num_threads(2)
    seen = []

    def fail(place: int) -> None:
        if not place:
            raise ZeroDivisionError
        time.sleep(0.05)
        seen.append(torch.get_num_threads())

    with pytest.raises(ZeroDivisionError):
        each(fail, 4, 1)
    assert set(seen) <= {1} and len(seen) < 4  # what had begun ended first, with one thread
    assert torch.get_num_threads() == 2 and each(lambda place: place, 4, 1) == [0, 1, 2, 3]


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork")
@pytest.mark.filterwarnings("ignore:.*multi-threaded:DeprecationWarning")
def test_a_forked_process_has_threads_of_its_own() -> None:
    torch.set_num_threads(2)
    assert each(lambda place: place, 4, 1) == [0, 1, 2, 3]
    child = os.fork()
    if not child:  # with the parent's threads, which it lacks, it would wait for ever
        signal.alarm(60)
        code = 1
        try:
            code = int(each(lambda place: place, 4, 1) != [0, 1, 2, 3])
        finally:
            os._exit(code)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
