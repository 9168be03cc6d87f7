"""The README.md of a spatial project."""

from typing import Any

from m3vit.export.hls.contents import EDITING, order_of_outputs


def readme(manifest: dict[str, Any]) -> str:
    """Return the text."""
    tasks = "\n".join(f"| {t['id']} | {t['name']} | {t['channels']} | {t['outputs']} |" for t in manifest["tasks"])
    rows, columns = manifest["grid"]
    height, width = manifest["image_size"]
    patch, precision = manifest["patch_size"], manifest["precision"]
    last = precision.get("pixel_head", precision["head"])
    return f"""# m3vit: an hls4ml project

Written by m3vit {manifest["m3vit"]} with hls4ml {manifest["hls4ml"]} (backend Vitis, io_stream). One accelerator for
{len(manifest["tasks"])} tasks: the task is an input, chosen for each image.

**It was never synthesised.** It is C-simulated with g++; no figure about an FPGA follows from that.

## C-simulate

```
g++ -O3 -std=c++17 -w -Ifirmware/ap_types -DWEIGHTS_DIR='"firmware/weights"' \\
    firmware/m3vit.cpp m3vit_test.cpp -o csim.exe
./csim.exe > /dev/null      # tb_data/tb_input_features.dat -> tb_data/csim_results.log, one line a run
m3vit hw csim .             # all stored images, all tasks, against torch -> csim.json
```

`tb_data/tb_input_features.dat` holds the first stored image once for each task; torch's outputs for it are in
`tb_data/tb_output_predictions.dat`. With `M3VIT_ROUTING_LOG=file` in the environment, each MoE layer appends which
experts its tokens went to. `-DM3VIT_HLS4ML_DENSE` simulates hls4ml's own Linear kernel instead of its bit-identical
stand-in on machine integers (see `firmware/nnet_utils/m3vit_dense.h`), about five times slower.

In Python, from this folder: `hls4ml.converters.link_existing_project('.')`, then `compile()` and
`predict([tokens, task])`.

## Inputs and outputs

- `tokens` [{manifest["tokens"]}, {manifest["token_width"]}], `{manifest["precision"]["tokens"]["result"]}`: the RGB
  image of {height} x {width} pixels cut into {rows} x {columns} patches of {patch} x {patch}, row by row; a token
  is one patch in the order colour, y, x; a value is pixel / 256. Normalisation is folded into the weights.
- `task` [1], `{manifest["precision"]["task"]["result"]}`: the task id (an unknown one counts as 0).
- output [{manifest["tokens"]}, {manifest["outputs"]}], `{last["result"]}`: for each
  token the outputs of the task, {order_of_outputs(manifest)}; zeros beyond
  its own. A pixel shuffle makes them the logits.

| task id | task | channels | outputs per token |
|---|---|---|---|
{tasks}

## What is where

hls4ml's layout; ours are `firmware/nnet_utils/m3vit_*.h` (layer norm, attention, mixture of experts, ...), `m3vit.json`
(sizes, precisions, sha256 of every file) and `tb_data/samples.npz` (images, labels, torch's outputs and routing).

{EDITING.format(formats="defines.h")}"""
