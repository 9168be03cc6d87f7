"""Python's collector while a command imports what it computes with."""

import gc
import sys

import pytest

from m3vit.collector import resting


class Cycle:
    """What only the collector frees."""

    def __init__(self) -> None:
        self.itself = self


@pytest.mark.parametrize("fails", [False, True])
def test_it_rests_and_leaves_alone_what_came(fails: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "torch", raising=False)  # as in a command's process
    gc.collect()
    frozen = gc.get_freeze_count()
    try:
        with resting():
            assert not gc.isenabled()
            cycles = [Cycle() for _ in range(100)]
            if fails:
                raise ModuleNotFoundError("No module named 'torch'")
    except ModuleNotFoundError:
        assert fails
    assert gc.isenabled()
    assert gc.get_freeze_count() >= frozen + 100 and cycles


def test_a_process_that_has_torch_keeps_its_collector() -> None:
    import torch

    frozen = gc.get_freeze_count()
    with resting():
        assert gc.isenabled() and torch
    assert gc.get_freeze_count() <= frozen  # nothing more; what was may be freed meanwhile
