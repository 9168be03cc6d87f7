"""A comparison (compare.py) as a file: JSON with everything, CSV for spreadsheets, Markdown and LaTeX for papers.

In Markdown and LaTeX a row is an evaluation and a column a task; the best of each column is bold. LaTeX needs booktabs.
"""

import csv
import io
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from m3vit.errors import InputError
from m3vit.files import atomic_path
from m3vit.tasks import TASKS

_LATEX = {"\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}"}
_LATEX |= {letter: f"\\{letter}" for letter in "&%$#_{}"}


def write_comparison(comparison: dict[str, Any], path: Path) -> None:
    """Write a comparison in the form that the file's ending names, or raise InputError for another ending."""
    text = form_of(path)(comparison)
    with atomic_path(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def form_of(path: Path) -> Callable[[dict[str, Any]], str]:
    """Return what makes the text of a file, by its ending; raise InputError for another ending."""
    if path.suffix not in FORMS:
        raise InputError(f"--out {path}: give a file that ends in {', '.join(FORMS)}")
    if path.is_dir():
        raise InputError(f"--out {path} is a folder: give a file that ends in {', '.join(FORMS)}")
    return FORMS[path.suffix]


def as_json(comparison: dict[str, Any]) -> str:
    return json.dumps(comparison, indent=2) + "\n"


def as_csv(comparison: dict[str, Any]) -> str:
    """A line for each evaluation and task; what there is none of is empty."""
    columns = ("evaluation", "task", "metric", "unit", "value", "low", "high")
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    writer.writerow([*columns, "difference", "difference_low", "difference_high"])
    for row in comparison["rows"]:
        for task, cell in row["tasks"].items():
            differs = [cell["difference"], *cell["difference_interval"]] if "difference" in cell else [""] * 3
            about = [row["name"], task, cell["metric"], TASKS[task].unit]
            writer.writerow([*about, cell["value"], *cell["interval"], *differs])
        if row["delta_m"] is not None:
            writer.writerow([row["name"], "all", "delta_m", "%", row["delta_m"], *[""] * 5])
    return buffer.getvalue()


def as_markdown(comparison: dict[str, Any]) -> str:
    titles, rows = _grid(comparison, "↑", "↓", lambda text: f"**{text}**")
    lines = ["| | " + " | ".join(titles) + " |", "|---|" + "---:|" * len(titles)]
    lines += [f"| {name.replace('|', chr(92) + '|')} | " + " | ".join(cells) + " |" for name, cells in rows]
    return "\n".join([*lines, "", *_caption(comparison)]) + "\n"


def as_latex(comparison: dict[str, Any]) -> str:
    titles, rows = _grid(comparison, r"$\uparrow$", r"$\downarrow$", lambda text: rf"\textbf{{{text}}}", _latex)
    lines = [f"% {line}" for line in _caption(comparison)]
    lines += [
        rf"\begin{{tabular}}{{l{'r' * len(titles)}}}",
        r"\toprule",
        " & ".join(["", *titles]) + r" \\",
        r"\midrule",
    ]
    lines += [" & ".join([_latex(name), *cells]) + r" \\" for name, cells in rows]
    return "\n".join([*lines, r"\bottomrule", r"\end{tabular}"]) + "\n"


FORMS = {".json": as_json, ".csv": as_csv, ".md": as_markdown, ".tex": as_latex}


def _latex(text: str) -> str:
    return "".join(_LATEX.get(letter, letter) for letter in text)


def _caption(comparison: dict[str, Any]) -> list[str]:
    """Return what a table needs to be understood, line by line."""
    lines = [
        f"{comparison['images']} val images; protocol {comparison['protocol']}; 95 % intervals over images "
        f"({comparison['resamples']} resamples)"
    ]
    if baseline := comparison["baseline"]:
        lines.append(f"delta_m over {baseline['name']} ({baseline['source']})")
    lines += [f"data: {comparison['origin']}"] if comparison["origin"] else []
    return [*lines, *comparison["notes"]]


def _grid(
    comparison: dict[str, Any],
    up: str,
    down: str,
    bold: Callable[[str], str],
    escape: Callable[[str], str] = str,
) -> tuple[list[str], list[tuple[str, list[str]]]]:
    """Return the titles of the columns, and each evaluation's name and cells."""
    rows = comparison["rows"]
    titles, columns = [], []
    for task, first in rows[0]["tasks"].items():
        higher = TASKS[task].higher_is_better
        titles.append(f"{escape(task)} {escape(first['metric'])} ({escape(TASKS[task].unit)}) {up if higher else down}")
        cells = [row["tasks"][task] for row in rows]
        values = [cell["value"] for cell in cells]
        shown = [f"{{}} [{cell['interval'][0]:.3f}, {cell['interval'][1]:.3f}]" for cell in cells]
        columns.append(_marked(values, shown, higher, bold, "{:.3f}"))
    if comparison["baseline"]:
        titles.append(f"{escape('delta_m (%)')} {up}")
        gains = [row["delta_m"] for row in rows]
        columns.append(_marked(gains, ["{}"] * len(gains), True, bold, "{:+.2f}"))
    return titles, [(row["name"], [column[place] for column in columns]) for place, row in enumerate(rows)]


def _marked(
    values: Sequence[float], shown: Sequence[str], higher: bool, bold: Callable[[str], str], form: str
) -> list[str]:
    """Return cells with their values put in, the best of them (as printed) bold."""
    texts = [form.format(value) for value in values]
    best = form.format(max(values) if higher else min(values))
    return [cell.format(bold(text) if text == best else text) for cell, text in zip(shown, texts, strict=True)]
