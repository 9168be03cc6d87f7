"""Reports of Vitis HLS in both published forms, written by hand: loops, resources, and which loop is which."""

from pathlib import Path

import pytest

from m3vit.errors import InputError
from m3vit.hw.csynth import Loop, matched, read_csynth

XML = """<profile>
<UserAssignments><TargetClockPeriod>3.33</TargetClockPeriod><TopModelName>m3vit</TopModelName></UserAssignments>
<PerformanceEstimates>
  <SummaryOfTimingAnalysis><EstimatedClockPeriod>2.433</EstimatedClockPeriod></SummaryOfTimingAnalysis>
</PerformanceEstimates>
<AreaEstimates><Resources><BRAM_18K>40</BRAM_18K><DSP>1100</DSP><FF>200000</FF><LUT>150000</LUT><URAM>32</URAM>
</Resources></AreaEstimates>
<ModuleInformation>
  <Module><Name>compute_vit_cfg_Pipeline_Step</Name><PerformanceEstimates><SummaryOfLoopLatency><Step>
    <Name>Step</Name><TripCount>undef</TripCount><PipelineII>2</PipelineII><PipelineDepth>31</PipelineDepth></Step>
  </SummaryOfLoopLatency></PerformanceEstimates></Module>
  <Module><Name>begin_linear_vit_cfg_Pipeline_First</Name><PerformanceEstimates><SummaryOfLoopLatency><First>
    <Name>First</Name><PipelineII>1</PipelineII><PipelineDepth>74</PipelineDepth></First>
  </SummaryOfLoopLatency></PerformanceEstimates></Module>
  <Module><Name>route_vit_cfg_s</Name><PerformanceEstimates><SummaryOfLoopLatency><Token>
    <Name>Token</Name><TripCount><range><min>1</min><max>129</max></range></TripCount><IterationLatency>90</IterationLatency>
    <Place_VITIS_LOOP_131_1><PipelineII>3</PipelineII><PipelineDepth>4</PipelineDepth></Place_VITIS_LOOP_131_1>
    </Token></SummaryOfLoopLatency></PerformanceEstimates></Module>
</ModuleInformation></profile>
"""
TABLE = """+ Performance & Resource Estimates:
    PS: '+' for module; 'o' for loop; '*' for dataflow
    +----------------------+------+------+---------+---------+----------+---------+------+----------+------+------+
    |        Modules       | Issue|      | Latency | Latency | Iteration|         | Trip |          |      |      |
    |        & Loops       | Type | Slack| (cycles)|   (ns)  |  Latency | Interval| Count| Pipelined| BRAM |  DSP |
    +----------------------+------+------+---------+---------+----------+---------+------+----------+------+------+
    |+ m3vit               |     -|  0.00|        -|        -|         -|        -|     -|        no|  40 (6%)| 1100|
    | + compute_vit_cfg_s  |     -|  0.00|        -|        -|         -|        -|     -|        no|  40 (6%)| 1024|
    |  o Work              |     -|  2.43|        -|        -|         -|        -|  1024|        no|     -|     -|
    |   o Step             |     -|  2.43|        -|        -|        31|        2|     -|       yes|     -|     -|
    +----------------------+------+------+---------+---------+----------+---------+------+----------+------+------+
"""


def write(folder: Path, text: str) -> Path:
    path = folder / "csynth.xml"
    path.write_text(text)
    return path


def test_both_forms(tmp_path: Path) -> None:
    found = read_csynth(write(tmp_path, XML))
    assert (found.top, found.target_ns, found.estimated_ns) == ("m3vit", 3.33, 2.433)
    assert found.resources == {"bram18": 40, "dsp": 1100, "ff": 200_000, "lut": 150_000, "uram": 32}
    assert [(loop.name, loop.ii, loop.depth) for loop in found.loops] == [
        ("Step", 2, 31),
        ("First", 1, 74),
        ("Place_VITIS_LOOP_131_1", 3, 4),
    ]
    table = read_csynth(write(tmp_path, TABLE))
    assert table.top == "m3vit" and table.resources == {"bram18": 40, "dsp": 1100}
    assert table.loops == [Loop("compute_vit_cfg_s", "Step", 2, 31)]
    # A label that two of ours have is told by its module.
    names = ["attention_first", "linear_first", "compute_step", "router_place", "norm_row"]
    loops = matched(found.loops, names)
    assert {name: loop.ii for name, loop in loops.items()} == {"linear_first": 1, "compute_step": 2, "router_place": 3}


@pytest.mark.parametrize(
    "text", ["", "<profile>", "<profile/>", "| a | b |", "no report", "<!DOCTYPE x [<!ENTITY a 'b'>]><x/>"]
)
def test_what_is_no_report_is_refused(tmp_path: Path, text: str) -> None:
    with pytest.raises(InputError, match=r"csynth\.rpt"):
        read_csynth(write(tmp_path, text))
