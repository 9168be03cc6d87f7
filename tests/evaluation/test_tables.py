"""Comparisons as files, against texts written by hand."""

import csv
import json
from pathlib import Path
from typing import Any

import pytest

from m3vit.errors import InputError
from m3vit.evaluation.tables import write_comparison


def cell(metric: str, value: float, low: float, high: float, difference: float | None = None) -> dict[str, Any]:
    found: dict[str, Any] = {"metric": metric, "value": value, "interval": [low, high]}
    return found if difference is None else {**found, "difference": difference, "difference_interval": [-1.5, 1.5]}


COMPARISON = {
    "protocol": "A (x)",
    "images": 654,
    "resamples": 1000,
    "origin": None,
    "notes": [],
    "baseline": {"name": "single", "source": "m3vit eval single", "metrics": {}},
    "rows": [
        {
            "name": "runs/a_b",
            "delta_m": 0.0,
            "tasks": {"semseg": cell("mIoU", 30.0, 29.0, 31.0), "depth": cell("rmse", 0.7, 0.6, 0.8)},
        },
        {
            "name": "runs/c|d",
            "delta_m": 2.5,
            "tasks": {"semseg": cell("mIoU", 31.0, 30.0, 32.0, 1.0), "depth": cell("rmse", 0.70001, 0.6, 0.8, 0.0)},
        },
    ],
}


def written(tmp_path: Path, name: str) -> str:
    write_comparison(COMPARISON, tmp_path / name)
    return (tmp_path / name).read_text(encoding="utf-8")


def test_markdown(tmp_path: Path) -> None:
    assert written(tmp_path, "table.md").splitlines() == [
        "| | semseg mIoU (%) ↑ | depth rmse (m) ↓ | delta_m (%) ↑ |",
        "|---|---:|---:|---:|",
        "| runs/a_b | 30.000 [29.000, 31.000] | **0.700** [0.600, 0.800] | +0.00 |",
        "| runs/c\\|d | **31.000** [30.000, 32.000] | **0.700** [0.600, 0.800] | **+2.50** |",
        "",
        "654 val images; protocol A (x); 95 % intervals over images (1000 resamples)",
        "delta_m over single (m3vit eval single)",
    ]


def test_latex(tmp_path: Path) -> None:
    assert written(tmp_path, "table.tex").splitlines()[2:] == [
        r"\begin{tabular}{lrrr}",
        r"\toprule",
        r" & semseg mIoU (\%) $\uparrow$ & depth rmse (m) $\downarrow$ & delta\_m (\%) $\uparrow$ \\",
        r"\midrule",
        r"runs/a\_b & 30.000 [29.000, 31.000] & \textbf{0.700} [0.600, 0.800] & +0.00 \\",
        r"runs/c|d & \textbf{31.000} [30.000, 32.000] & \textbf{0.700} [0.600, 0.800] & \textbf{+2.50} \\",
        r"\bottomrule",
        r"\end{tabular}",
    ]


def test_csv_and_json_have_everything(tmp_path: Path) -> None:
    rows = list(csv.DictReader(written(tmp_path, "table.csv").splitlines()))
    assert [(row["evaluation"], row["task"]) for row in rows[3:]] == [
        ("runs/c|d", "semseg"),
        ("runs/c|d", "depth"),
        ("runs/c|d", "all"),
    ]
    assert rows[0]["difference"] == "" and float(rows[3]["difference"]) == 1 and float(rows[3]["low"]) == 30
    assert rows[4]["unit"] == "m" and float(rows[5]["value"]) == 2.5
    assert json.loads(written(tmp_path, "table.json")) == COMPARISON


def test_other_endings_are_refused(tmp_path: Path) -> None:
    for name in ("table", "table.xlsx"):
        with pytest.raises(InputError, match=r"give a file that ends in \.json, \.csv, \.md, \.tex"):
            write_comparison(COMPARISON, tmp_path / name)
    (tmp_path / "folder.md").mkdir()
    with pytest.raises(InputError, match="is a folder"):
        write_comparison(COMPARISON, tmp_path / "folder.md")
