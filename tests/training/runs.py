"""Compares run folders."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file


def lines(run_folder: Path) -> list[dict[str, Any]]:
    """Return the lines of a run's log, without their digests."""
    found = [json.loads(line) for line in (run_folder / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in line.items() if key != "digest"} for line in found]


def assert_close(one: Path, other: Path, weights_atol: float) -> None:
    """Assert equal losses up to 1e-4, scores up to a few pixels near a decision, and weights up to a tolerance."""
    for a, b in zip(lines(one), lines(other), strict=True):
        kind = a["kind"]
        for word in ("kind", "message", "protocol"):
            assert a.pop(word, "") == b.pop(word, "")
        assert a == pytest.approx(b, rel=1e-4 if kind == "train" else 1e-2)
    for file in ("model.safetensors", "best/model.safetensors"):
        expected, found = load_file(one / file), load_file(other / file)
        for name in expected:
            torch.testing.assert_close(found[name], expected[name], rtol=0, atol=weights_atol)


def same_bits(one: Path, other: Path) -> None:
    assert (one / "metrics.jsonl").read_text() == (other / "metrics.jsonl").read_text()
    for file in ("model.safetensors", "best/model.safetensors"):
        expected, found = load_file(one / file), load_file(other / file)
        assert all(torch.equal(expected[name], found[name]) for name in expected)
