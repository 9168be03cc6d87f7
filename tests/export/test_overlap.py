"""Stages that run beside one another: in order, with errors where they belong, and over when nobody wants more."""

import threading
import time
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest

from m3vit.errors import InputError
from m3vit.export.runtime import predict
from m3vit.export.runtime.overlap import ROOM, Behind, Pace, ahead
from m3vit.export.runtime.predict import predict_files
from tests.export.films import pictures, read_film, write_film


def test_items_come_in_order_and_a_few_ahead() -> None:
    made: list[int] = []

    def items() -> Iterator[int]:
        for number in range(50):
            made.append(number)
            yield number

    for number in (source := ahead(items(), threading.Event())):
        assert len(made) <= number + ROOM + 2  # the one that is used, those that wait, the one at hand
        if number == 10:
            time.sleep(0.05)
    assert made == list(range(50)) and list(source) == []


def test_what_making_raises_is_raised_after_what_was_made() -> None:
    def items() -> Iterator[int]:
        yield from range(3)
        raise InputError("torn")

    found = []
    with pytest.raises(InputError, match="torn"):
        for number in ahead(items(), threading.Event()):
            found.append(number)
    assert found == [0, 1, 2]


def test_closing_ends_the_thread() -> None:
    stop, before = threading.Event(), threading.active_count()

    def items() -> Iterator[int]:
        while not stop.is_set():  # as a stream that sends nothing more
            yield 1

    with closing(ahead(items(), stop)) as source:
        assert next(source) == 1
    assert stop.is_set() and threading.active_count() == before


def test_calls_are_made_in_order_and_few_wait() -> None:
    done, gate = [], threading.Event()
    with Behind() as behind:
        behind.call(gate.wait)  # type: ignore[arg-type]
        for number in range(ROOM - 1):
            behind.call(lambda number=number: done.append(number))  # type: ignore[misc]
        threading.Timer(0.05, gate.set).start()
        behind.call(lambda: done.append(-1))  # waits for the first
        assert gate.is_set()
        behind.finish()
    assert done == [*range(ROOM - 1), -1]


def test_what_a_call_raises_is_raised_later_and_ends_the_rest() -> None:
    done: list[int] = []

    def fail() -> None:
        raise InputError("full")

    with pytest.raises(InputError, match="full"), Behind() as behind:
        behind.call(fail)
        behind.finish()
    with pytest.raises(ValueError, match="other"), Behind() as behind:
        behind.call(lambda: done.append(1))
        raise ValueError("other")
    assert done in ([], [1])


def test_pace_by_hand() -> None:
    pace = Pace()
    assert pace.line() == ""
    pace.seconds = [0.1] * 98 + [0.2, 1.2]
    assert pace.percentile(50) == pytest.approx(0.1) and pace.percentile(99) == pytest.approx(0.21)
    assert pace.line() == "8.9 frames a second; ms from one to the next: 50 % 100.0, 95 % 100.0, 99 % 210.0"
    pace.seconds = [0.5]
    assert pace.line().startswith("2.0 frames")


@pytest.mark.slow
def test_a_film_whose_drawing_fails_leaves_nothing(
    onnx_package: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    film = write_film(tmp_path / "clip.mkv", pictures(20), codec="ffv1")
    whole = predict_files(onnx_package, "depth", [film], tmp_path / "out")
    assert len(read_film(whole.written[0])[0]) == 20
    ((name, line),) = whole.paces
    assert name == str(film) and "frames a second" in line
    calls = []

    def failing(*words: object) -> None:
        calls.append(words)
        if len(calls) == 7:
            raise InputError("the disk is full")

    monkeypatch.setattr(predict._TaskWriter, "write", failing)
    outcome = predict_files(onnx_package, "depth", [film], tmp_path / "other")
    assert [reason for _, reason in outcome.failures] == ["the disk is full"] and not outcome.written
    assert len(calls) == 7 and not list((tmp_path / "other").iterdir())
    assert not [thread for thread in threading.enumerate() if thread.name.startswith(("ahead", "behind"))]
