"""The README.md of a time-multiplexed project."""

from typing import Any

from m3vit.export.hls.contents import EDITING, order_of_outputs
from m3vit.hw.boards import find_board
from m3vit.hw.manifest import budget_names
from m3vit.hw.output_memory import OutputLayout

BITSTREAM = "vivado -mode batch -source vivado_design.tcl -tclargs bitstream      # m3vit.bit, m3vit.hwh"
NO_DESIGN = "# the block design around the IP is yours to make: the one that we have is for Zynq UltraScale+ boards"


def readme(manifest: dict[str, Any]) -> str:
    """Return the text."""
    layout = OutputLayout.of(manifest)
    tasks = "\n".join(
        f"| {task['id']} | {task['name']} | {task['channels']} | {task['outputs']} | {frac} "
        f"| {layout.pixel_outputs[place]} | {layout.pixel_pitches[place]} |"
        for place, (task, frac) in enumerate(zip(manifest["tasks"], manifest["output_fracs"], strict=True))
    )
    rows, columns = manifest["grid"]
    height, width = manifest["image_size"]
    hardware = manifest["hardware"]
    names = [name for name in budget_names(manifest) if name]
    several = (
        f"""
`accelerator.set_budget("{names[-1]}")` takes another program around the same weights; there are {", ".join(names)}.
"""
        if len(names) > 1
        else ""
    )
    maps = manifest["precision"].get("maps_of_16_bits", [])
    fine = f" (16, in two bytes: the inputs of {', '.join(maps)})" if maps else ""
    entries = "; ".join(f"{name} {start}" for name, start in zip(names, manifest.get("entries", []), strict=False))
    return f"""# m3vit: a time-multiplexed accelerator

Written by m3vit {manifest["m3vit"]} with hls4ml {manifest["hls4ml"]} (backend VitisMoE) for {manifest["board"]}. One
engine of each kind (linear, attention, LayerNorm, router) works through a program in DDR, from the pixels of an image
to the outputs of the task heads. The task is a register, chosen for each frame; so is the program, of several budgets.

**What has been simulated:** the C++ in `firmware/`, with g++ (`make check`, `m3vit hw csim .`), word for word against
an emulator in Python; the engines, on random models, also under address and undefined-behaviour sanitizers. **What has
not:** it was never synthesised, co-simulated or run on a board. The Tcl scripts ran with the vendor's commands logged
instead of executed, the host driver against a software model of the registers and memory. The figures of
`resources.json` are modelled.

## C-simulate

```
make check          # g++ only: the stored frame for each budget and task, compared with tb_data/expected_outputs.bin
m3vit hw csim .     # all stored images against torch and the emulator -> csim.json
m3vit eval . --data.root DIR                     # a whole validation set, by the emulator
```

`./csim.exe WEIGHTS IMAGES TASKS OUTPUTS COUNTERS ROUTING` runs other frames and tells the bytes through each port and
the saturated values by instruction; `m3vit_test.cpp` describes the files. `make CXXFLAGS="-O3 -march=native"` is
faster.

## Build (needs Vitis HLS and Vivado, 2022.2 or newer)

```
vitis_hls -f build_prj.tcl                              # C-simulation, synthesis, IP
{BITSTREAM if find_board(manifest["board"]).system == "zynq_ultrascale" else NO_DESIGN}
```

Part and clock are in `project.tcl`. On the board, with PYNQ (`host/m3vit_driver.py` says more):

```python
overlay = Overlay("m3vit.bit")
accelerator = Accelerator(overlay.m3vit_0, allocate, "..")
accelerator.set_task("{manifest["tasks"][0]["name"]}")
prediction = accelerator.predict(image)  # uint8 [{height}, {width}, 3]
```
{several}
## Interface

- `image`: uint8 [{height}, {width}, 3], RGB; normalisation is folded into the weights.
- `task`: the task id, an unknown one counts as 0; `num_tasks`: {len(manifest["tasks"])}.
- `entry`: the instruction that a frame begins with: {entries or "0"}.
- `weights`, `gates`, `params`: the three sections of `firmware/weights/weights.bin`; `weights_map.json` says where each
  tensor lies, lists the program, and the elements of the memories below.
- `keys`, `narrow_in`, `narrow_out`: one memory of int{8 if hardware["act_bits"] <= 8 else 16};
  `wide_in`, `wide`, `more_wide_in`, `more_wide`: one of int{hardware["wide_bits"]}. Scratch: nothing in them outlasts
  a frame.
- `output`: int32 [{manifest["tokens"]} ({rows} x {columns} patches), {layout.token_pitch}], raw words with the
  fractional bits below. A token has {layout.pixels} row(s), each at a whole word of the port; how many outputs a row
  begins with, and how far rows are apart, is below. What is between is no output, which `host/m3vit_output_memory.py`
  takes out.
  A token's outputs without it are {order_of_outputs(manifest)}.
  A pixel shuffle and a bilinear resize make them logits (`host/m3vit_decoding.py`).

| task id | task | channels | outputs per token | fractional bits | outputs of a row | rows apart |
|---|---|---|---|---|---|---|
{tasks}

Weights have {hardware["weight_bits"]} bits, narrow tensors {hardware["act_bits"]}{fine}, the residual stream
{hardware["wide_bits"]}
({manifest["precision"]["wide_frac"]} fractional); the largest sum needs {manifest["precision"]["largest_sum_bits"]}.

{EDITING.format(formats="model.h")}"""
