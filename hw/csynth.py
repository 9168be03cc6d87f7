"""What Vitis HLS reports of a synthesis: csynth.xml, or the summary csynth.rpt, as their format is published. No torch.

Written from published reports (Vitis HLS 2021 to 2024); none of our own projects was ever synthesised.
"""

import re
import xml.etree.ElementTree as ET
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from m3vit.errors import InputError
from m3vit.files import read_text

KINDS = {"BRAM_18K": "bram18", "DSP": "dsp", "DSP48E": "dsp", "FF": "ff", "LUT": "lut", "URAM": "uram"}
LIMIT = 64 << 20  # bytes of a report
ADVICE = "give the csynth.xml, or the csynth.rpt, of solution/syn/report"


class Loop(NamedTuple):
    """A pipelined loop of a module: its initiation interval, and the cycles of one iteration (depth)."""

    module: str
    name: str
    ii: int
    depth: int


@dataclass
class Synthesis:
    """What a report says: the clock asked for and estimated (ns), pipelined loops, resources of the whole design."""

    top: str
    target_ns: float | None
    estimated_ns: float | None
    loops: list[Loop]
    resources: dict[str, int]


def read_csynth(path: Path) -> Synthesis:
    """Read a report. Raises InputError for a file that is none."""
    text = read_text(path, ADVICE, LIMIT)
    if text.lstrip().startswith("<"):
        if "<!DOCTYPE" in text or "<!ENTITY" in text:
            raise InputError(f"{path} is not a report of Vitis HLS (it declares a document type): {ADVICE}")
        try:
            found = _of_xml(ET.fromstring(text))
        except ET.ParseError as error:
            raise InputError(f"{path} is not a report of Vitis HLS ({error}): {ADVICE}") from None
    else:
        found = _of_table(text)
    if not found.loops and not found.resources:
        raise InputError(f"{path} has neither loops nor resources of a synthesis: {ADVICE}")
    return found


def _whole(text: str | None) -> int | None:
    match = re.match(r"\d+", (text or "").strip())
    return int(match[0]) if match else None


def _number(text: str | None) -> float | None:
    try:
        return float(text or "")
    except ValueError:
        return None


def _of_xml(root: ET.Element) -> Synthesis:
    top = root.findtext(".//TopModelName") or root.findtext(".//RTLDesignName") or ""
    loops = list(_xml_loops(top, root.find("PerformanceEstimates")))
    for module in root.iterfind("ModuleInformation/Module"):
        loops += _xml_loops(module.findtext("Name") or "", module.find("PerformanceEstimates"))
    area = root.find("AreaEstimates/Resources")
    resources = {}
    for element in area if area is not None else ():
        count = _whole(element.text)
        if element.tag in KINDS and count is not None:
            resources[KINDS[element.tag]] = count
    estimated = root.findtext("PerformanceEstimates/SummaryOfTimingAnalysis/EstimatedClockPeriod")
    return Synthesis(top, _number(root.findtext(".//TargetClockPeriod")), _number(estimated), loops, resources)


def _xml_loops(module: str, estimates: ET.Element | None) -> Iterator[Loop]:
    """Yield the pipelined loops of a module, inner ones included: a loop is an element of its own name."""
    for loop in estimates.iterfind("SummaryOfLoopLatency//*") if estimates is not None else ():
        ii, depth = _whole(loop.findtext("PipelineII")), _whole(loop.findtext("PipelineDepth"))
        if ii is not None and depth is not None:
            yield Loop(module, loop.findtext("Name") or loop.tag, ii, depth)


def _of_table(text: str) -> Synthesis:
    """Read the table of modules ('+') and loops ('o') of a synthesis summary; its first line is the whole design."""
    columns: dict[str, int] = {}
    rows: list[list[str]] = []
    heads: list[list[str]] = []
    for line in text.splitlines():
        cells = [cell.strip() for cell in line.strip().strip("|").split("|")] if line.strip().startswith("|") else []
        if not cells:
            continue
        if re.match(r"[+o*] ?\w", cells[0]):
            if not columns and heads:
                titles = [" ".join(part for part in column if part) for column in zip(*heads[-2:], strict=False)]
                columns = {title.lower(): place for place, title in enumerate(titles)}
            rows.append(cells)
        else:
            heads.append(cells)

    def cell(row: Sequence[str], title: str) -> str:
        return row[columns[title]] if title in columns and columns[title] < len(row) else ""

    top, module, loops, resources = "", "", list[Loop](), dict[str, int]()
    for row in rows:
        name = row[0].lstrip("+o* ").strip()
        if row[0].startswith("o"):
            ii, depth = _whole(cell(row, "interval")), _whole(cell(row, "iteration latency"))
            if cell(row, "pipelined") == "yes" and ii is not None and depth is not None:
                loops.append(Loop(module, name, ii, depth))
            continue
        module = name
        if not top:
            top = name
            wanted = {"bram": "bram18", "dsp": "dsp", "ff": "ff", "lut": "lut", "uram": "uram"}
            counts = {kind: _whole(cell(row, title)) for title, kind in wanted.items()}
            resources = {kind: count for kind, count in counts.items() if count is not None}
    return Synthesis(top, None, None, loops, resources)


def matched(loops: Sequence[Loop], names: Sequence[str]) -> dict[str, Loop]:
    """Return the reported loop of each of ours, "linear_first" say: of its label ("First"), in a module whose name has
    the word before it where several have that label. Of several that remain, the one with the largest II and depth."""
    found = {}
    for name in names:
        words, _, label = name.rpartition("_")
        own = [loop for loop in loops if re.fullmatch(rf"{label}(_.*)?", loop.name, re.IGNORECASE)]
        shared = [other for other in names if other.rpartition("_")[2] == label]
        if len(shared) > 1:
            own = [loop for loop in own if words in loop.module.lower()]
        if own:
            found[name] = max(own, key=lambda loop: (loop.ii, loop.depth))
    return found
