"""What a time-multiplexed project's files hold that depends on the model. Needs neither torch nor hls4ml."""

from dataclasses import asdict
from typing import Any

from m3vit.hw import boards
from m3vit.hw.boards import BUDGETS, Board
from m3vit.hw.hardware import DERIVED, Hardware
from m3vit.hw.isa import BLANK, Mode
from m3vit.hw.ops import GATE_BITS
from m3vit.hw.output_memory import OutputLayout
from m3vit.hw.program import Image
from m3vit.hw.weights_file import HEADER_WORDS

HEAD = (
    "weight_bits",
    "act_bits",
    "wide_bits",
    "max_head",
    "uram",
    "tiles_in_lut",
    "gates_in_lut",
    "finished_in_uram",
    "norm_in_lut",
)  # of Hardware: written in other words
TYPES = {8: "int8_t", 16: "int16_t"}
WIDE_TYPES = {16: "int16_t", 32: "int32_t"}
NOTICE = "// Written by m3vit; depends on the model."

TOP_ARGUMENTS = """const vit_words::image *image, unsigned task, unsigned num_tasks, unsigned entry,
           const vit_words::weights *weights, const vit_words::weights *more_weights, const vit_words::gates *gates,
           const vit_words::params *params, const vit_words::narrow *keys, const vit_words::narrow *narrow_in,
           vit_words::narrow *narrow_out, const vit_words::wide *wide_in, vit_words::wide *wide,
           const vit_words::wide *more_wide_in, vit_words::wide *more_wide, vit_words::params *output"""
# Bundles: what works at the same time (the processes of a dataflow region) has ports of its own.
PORTS = {
    "image": "io",
    "weights": "weights",
    "more_weights": "more_weights",
    "gates": "tables",
    "params": "tables",
    "keys": "keys",
    "narrow_in": "narrow_in",
    "narrow_out": "narrow_out",
    "wide_in": "wide",
    "wide": "wide",
    "more_wide_in": "more_wide",
    "more_wide": "more_wide",
    "output": "io",
}


def parameters_text(hardware: Hardware) -> str:
    """Return firmware/parameters.h: the configuration of the engines (m3vit_engine.h says what each is)."""
    constants = {name: value for name, value in hardware.plain().items() if name not in HEAD}
    constants |= {name: getattr(hardware, name) for name in DERIVED}
    lines = [f"    static const unsigned {name} = {int(value)};" for name, value in constants.items()]
    return "\n".join(
        [
            NOTICE,
            "#ifndef M3VIT_PARAMETERS_H_",
            "#define M3VIT_PARAMETERS_H_",
            "",
            *(["#define M3VIT_URAM // the inputs of a block of tokens lie in URAM"] if hardware.uram else []),
            *(["#define M3VIT_TILES_IN_LUT // weight tiles lie in LUTs"] if hardware.tiles_in_lut else []),
            *(["#define M3VIT_GATES_IN_LUT // and those of routers"] if hardware.gates_in_lut else []),
            *(["#define M3VIT_FINISHED_IN_URAM // and what attention divides"] if hardware.finished_in_uram else []),
            *(["#define M3VIT_NORM_IN_LUT // so do some of LayerNorm's products"] if hardware.norm_in_lut else []),
            '#include "nnet_utils/m3vit_accelerator.h"',
            "",
            "#ifdef __SYNTHESIS__",
            "#define M3VIT_LOCAL",
            "#else // a process that loads two projects' libraries has the memories of both",
            '#define M3VIT_LOCAL __attribute__((visibility("hidden")))',
            "#endif",
            "struct M3VIT_LOCAL vit_cfg {",
            f"    typedef {TYPES[hardware.weight_word]} wt_t; // weights have {hardware.weight_bits} bits",
            f"    typedef {TYPES[hardware.act_word]} act_t;",
            f"    typedef {WIDE_TYPES[hardware.wide_bits]} wide_t;",
            f"    static const int act_bits = {hardware.act_bits}, wide_bits = {hardware.wide_bits};",
            f"    static const bool packed = {str(hardware.packed).lower()};",
            *lines,
            "};",
            "typedef nnet::vit::words<vit_cfg> vit_words; // of each memory: what a port moves at once",
            "",
            "#endif",
            "",
        ]
    )


def top_text(depths: dict[str, int], port_bits: int) -> str:
    """Return firmware/m3vit.cpp; `depths`: words of each memory, for co-simulation."""
    pragmas = [
        f"    #pragma HLS INTERFACE m_axi port={port} offset=slave bundle={bundle} depth={depths[port]} "
        f"max_widen_bitwidth={port_bits} num_read_outstanding=64 num_write_outstanding=64"
        for port, bundle in PORTS.items()
    ]
    scalars = [f"    #pragma HLS INTERFACE s_axilite port={port}" for port in ("task", "num_tasks", "entry", "return")]
    return "\n".join(
        [
            NOTICE,
            '#include "m3vit.h"',
            "",
            f"void m3vit({TOP_ARGUMENTS}) {{",
            *pragmas,
            *scalars,
            "    nnet::vit::run_program<vit_cfg>(image, task, num_tasks, entry, weights, more_weights, gates, params,",
            "                                    keys, narrow_in, narrow_out, wide_in, wide, more_wide_in,",
            "                                    more_wide, output);",
            "}",
            "",
        ]
    )


HEADER_TEXT = f"""{NOTICE}
#ifndef M3VIT_H_
#define M3VIT_H_

#include "parameters.h"

// more_weights: the weights; keys, narrow_in and narrow_out: the narrow memory; wide_in, wide, more_wide_in and
// more_wide: the wide memory.
void m3vit({TOP_ARGUMENTS});

#endif
"""


def model_text(settings: dict[str, Any], output_fracs: list[int], layout: OutputLayout) -> str:
    """Return firmware/model.h: what the bridge to hls4ml's predict() knows of the model."""
    rows, columns = settings["grid"]
    of_tasks = {
        "output_frac": output_fracs,
        "pixel_outputs": layout.pixel_outputs,
        "pixel_pitch": layout.pixel_pitches,
    }
    functions = [
        line
        for name, values in of_tasks.items()
        for line in (
            f"    static int {name}(unsigned task) {{",
            f"        static const int values[] = {{{', '.join(map(str, values))}}};",
            "        return values[task];",
            "    }",
        )
    ]
    return "\n".join(
        [
            NOTICE,
            "#ifndef M3VIT_MODEL_H_",
            "#define M3VIT_MODEL_H_",
            "",
            "struct vit_model {",
            f"    static const int rows = {rows}, columns = {columns}, patch = {settings['patch']};",
            "    // outputs: of a token and the widest task; the others say where the output memory has them.",
            f"    static const int outputs = {layout.pixels * max(layout.pixel_outputs)};",
            f"    static const int pixels = {layout.pixels}, token_pitch = {layout.token_pitch};",
            *functions,
            "};",
            "",
            "#endif",
            "",
        ]
    )


def depths_of(image: Image, hardware: Hardware) -> dict[str, int]:
    """Return the words that each port of the accelerator reaches."""
    memory = image.memory
    lanes = {"weights": hardware.weight_word, "gates": GATE_BITS, "params": 32}
    narrow = dict.fromkeys(("keys", "narrow_in", "narrow_out"), -(-memory.narrow // hardware.values(hardware.act_word)))
    wide = -(-memory.wide // hardware.values(hardware.wide_bits))
    sections = {name: max(1, -(-getattr(image, name).size // hardware.values(bits))) for name, bits in lanes.items()}
    sections["more_weights"] = sections["weights"]
    return {
        "image": memory.image // hardware.pixels,
        **sections,
        **narrow,
        "wide_in": wide,
        "wide": wide,
        "more_wide_in": wide,
        "more_wide": wide,
        "output": -(-memory.output // hardware.values(32)),
    }


def program_lines(image: Image, place: int = 0) -> list[dict[str, Any]]:
    """Return a program for people: one entry an instruction, zeros and what is not set left out."""
    lines = []
    for pc, instruction in enumerate(image.program_of(place), image.starts[place]):
        values = asdict(instruction).items()
        fields = {name: value for name, value in values if value != BLANK.get(name, 0) or name in ("src", "dst")}
        if "mode" in fields:
            fields["mode"] = Mode(fields["mode"]).name.lower()
        lines.append({"pc": pc, "op": instruction.op.name.lower(), **fields})
    return lines


def weights_map(schedule: Any) -> dict[str, Any]:
    """Return weights_map.json: where everything lies in weights.bin, the programs, and the memories to allocate."""
    image = schedule.image
    further = [program_lines(image, place) for place in range(1, len(image.starts))]
    return {
        "header_words": HEADER_WORDS,
        "memory_elements": image.memory._asdict(),
        "tensors": schedule.tensors,
        "program": program_lines(image),
        **({"further_programs": further} if further else {}),
    }


def resources(hardware: Hardware, board: Board) -> dict[str, Any]:
    """Return resources.json: what the accelerator takes of the board, modelled (never synthesised)."""
    return {
        "note": "modelled from widths and depths of the memories and the number of multipliers; never synthesised",
        "board": board.name,
        "part": board.part,
        "clock_mhz": board.clock_mhz,
        "hardware": hardware.plain(),
        "modelled": boards.resources(hardware),
        "budget": {name: int(share * getattr(board, name)) for name, share in BUDGETS.items()},
    }
