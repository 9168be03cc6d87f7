"""Published figures that our closed forms reproduce, and that a wrong form is found."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from m3vit.hw.published import EDGE_MOE_QUEUES, EdgeMoe, Table4
from m3vit.hw.validate import Row, all_hold, edge_moe_rows, table4_rows, validate
from tests.conftest import Cli


def test_all_rows_hold() -> None:
    rows = validate()
    assert all_hold(rows), [row for row in rows if not row.holds]
    assert len([row for row in rows if row.what.startswith("M3ViT table 4")]) == 9
    assert {row.our_level.split(":")[0].split(" from")[0] for row in rows} == {"modelled"}


def test_table4_by_hand() -> None:
    """An expert: (2 x 384 x 384 + 768) x 1.5 = 443,520 bytes, 6930 words of 64, 6932 cycles; 1025 x 4 x 6 of them."""
    model = Table4()
    assert model.expert_bytes == 443_520
    assert model.penalty_ms(1025) == pytest.approx(1025 * 24 * 6932 / 300e3)
    assert model.experts_mib == pytest.approx(6.7676, abs=1e-4)
    assert model.reordered_ms(1025) - model.dense_ms(1025) == pytest.approx(5 * 1025 * 6 / 300e3)


def test_edge_moe_by_hand() -> None:
    """One expert of one token, then none: both loads in full, and the products of one token beside the second."""
    model = replace(EdgeMoe(), moe_layers=1, layers=1, fill=0, read=0)
    load = 2 * (192 * 384 // 16 + 24)  # two cycles a word: weights, biases of 384 outputs
    other = 2 * (192 * 384 // 16 + 12)
    assert model.cycles([1])["experts"] == load + other + 24 * 12
    # Attention: 33 groups of queries, 129 keys of 24 words, two cycles each.
    assert model.cycles([1])["queries x keys"] == 33 * 129 * 24 * 2


@pytest.mark.parametrize(
    "change", [{"weight_bits": 16}, {"bytes_a_cycle": 32}, {"fetch_cycles": 10}, {"macs_a_cycle": 1728}]
)
def test_another_model_is_out_of_table4(change: dict[str, int]) -> None:
    assert not all_hold(list(table4_rows(replace(Table4(), **change))))


def test_trip_counts_alone_are_out_of_edge_moe() -> None:
    """Ports as wide as the source asks for: 20.8 ms, 40 % below what was measured."""
    rows = list(edge_moe_rows(replace(EdgeMoe(), beat=1)))
    assert not any(row.holds for row in rows if row.unit == "ms")
    assert replace(EdgeMoe(), beat=1).ms(EDGE_MOE_QUEUES["task 0"]) == pytest.approx(20.8, rel=0.02)


def test_the_command(cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    done = cli("hw", "validate", "--json", tmp_path / "rows.json")
    assert done.returncode == 0 and "reproduces the paper's model" in " ".join(done.stdout.split())
    found = json.loads((tmp_path / "rows.json").read_text())
    assert found["hold"] and {row["unit"] for row in found["rows"]} == {"ms", "MiB", "", "cycles"}
    wrong = Row("a row", "ms", 2.0, "modelled", 1.0, "measured by its authors", -0.1, 0.1)
    monkeypatch.setattr("m3vit.hw.validate.validate", lambda *_: [wrong])
    done = cli("hw", "validate")
    assert done.returncode == 1 and "OUT" in done.stdout and "1 are out" in done.stdout
