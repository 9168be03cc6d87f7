"""The engines of the time-multiplexed accelerator: C++ and emulator, word for word, and both against float."""

import math
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from m3vit.export.hls.multiplexed.scheduler import Scheduler
from m3vit.export.hls.multiplexed.sources import PORTS as PORT_BUNDLES
from m3vit.export.hls.multiplexed.sources import TOP_ARGUMENTS, top_text
from m3vit.hw import arithmetic, isa_header
from m3vit.hw.hardware import PORT_BITS, Hardware
from m3vit.hw.isa import WORDS, End, Mode, Op, Route
from m3vit.hw.layer_bits import names_of_maps
from m3vit.hw.ops import PORTS, memories
from m3vit.hw.program import Image
from m3vit.hw.sim import csim
from m3vit.hw.sim.emulator import Emulator
from tests.hw.programs import (
    FORMATS,
    HARDWARE,
    INCLUDE,
    ROOT,
    STRICT,
    WIDE,
    Builds,
    Shape,
    Simulator,
    frames_of,
    hardware_of,
    random_vit,
)
from tests.hw.test_kernels import AP_TYPES
from tests.test_imports import WITH_TORCH

pytestmark = pytest.mark.slow


def check_words(
    builds: Builds, shape: Shape, folder: Path, seed: int = 0, port_bits: int = PORT_BITS
) -> tuple[np.ndarray, list[dict[str, int]]]:
    """Run a random model for every task in C++ and in the emulator; return the outputs and counters."""
    image, _ = random_vit(shape, seed, port_bits)
    frames = frames_of(shape, shape.tasks, seed)
    name = f"w{shape.weight_bits}a{shape.act_bits}"
    runs = [
        simulator.run(folder / str(place), image, frames, list(range(shape.tasks)))
        for place, simulator in enumerate(builds[name])
    ]
    outputs, counters, routing = runs[0]
    for others, other_counters, _ in runs[1:]:  # -O0 with sanitizers and -O2
        np.testing.assert_array_equal(outputs, others)
        assert counters == other_counters
    emulator = Emulator(image)
    expected = [emulator.run(frame, task) for task, frame in enumerate(frames)]
    np.testing.assert_array_equal(outputs, np.stack([result.outputs for result in expected]))
    ids = [ids.ravel() for result in expected for ids in result.expert_ids]
    np.testing.assert_array_equal(routing, np.concatenate([np.zeros(0, np.int64), *ids]))
    for task, result in enumerate(expected):
        counted = {line["pc"]: line["saturated"] for line in counters if line["frame"] == task and line["saturated"]}
        assert counted == result.saturated
    return outputs, counters


def test_hardware_modules_need_neither_torch_nor_hls4ml() -> None:
    script = "import sys, m3vit.hw.boards, m3vit.hw.arithmetic, m3vit.hw.isa_header, m3vit.kinds.decoding;"
    script += "sys.exit(any(m in sys.modules for m in ('torch', 'hls4ml', 'onnxruntime')))"
    subprocess.run([sys.executable, "-c", script], check=True)


def test_hardware_stands_below_the_exporter_and_torch_is_the_emulators() -> None:
    for path in (ROOT / "hw").rglob("*.py"):
        imported = re.findall(r"^\s*(?:from|import) ([\w.]+)", path.read_text(), re.MULTILINE)
        assert not any(name.startswith("m3vit.export") for name in imported), path.name
        module = ".".join(("m3vit", *path.relative_to(ROOT).with_suffix("").parts))
        assert ("torch" in imported) == (module in WITH_TORCH), path.name


@pytest.mark.parametrize("name", sorted(path.name for path in (INCLUDE / "engine").glob("*.h")))
def test_header_stands_alone_without_ap_types(name: str, tmp_path: Path) -> None:
    source = tmp_path / "twice.cpp"
    source.write_text(f'#include "{name}"\n#include "{name}"\n')
    paths = [f"-I{INCLUDE}", f"-I{INCLUDE / 'engine'}"]
    command = [csim.find_compiler(), *STRICT, "-fsyntax-only", *paths, str(source)]
    subprocess.run(command, check=True)
    subprocess.run([*command, "-D__SYNTHESIS__"], check=True)  # what Vitis HLS reads: without counters and logs


@pytest.mark.skipif(not shutil.which("clang++"), reason="clang++ is not installed")
@pytest.mark.parametrize("definition", [[], ["-D__SYNTHESIS__"]], ids=["simulation", "synthesis"])
def test_clang_takes_the_engines(definition: list[str], tmp_path: Path) -> None:
    """Vitis HLS reads C++ by clang, which refuses what g++ lets pass, such as a member of a template's name."""
    source = tmp_path / "all.cpp"
    names = sorted(path.name for path in (INCLUDE / "engine").glob("*.h"))
    source.write_text("".join(f'#include "{name}"\n' for name in names))
    paths = [f"-I{INCLUDE}", f"-I{INCLUDE / 'engine'}"]
    subprocess.run(["clang++", *STRICT, "-fsyntax-only", *paths, *definition, str(source)], check=True)


def test_generated_header_and_table_are_current() -> None:
    assert (INCLUDE / "engine" / isa_header.HEADER).read_text() == isa_header.header_text()
    assert isa_header.docs_table() in (ROOT / "docs" / "hls.md").read_text()


def test_no_float_and_no_allocation_in_the_engines() -> None:
    for path in [*(INCLUDE / "engine").glob("*.h"), INCLUDE / "m3vit_integer.h"]:
        code = "\n".join(line.split("//")[0] for line in path.read_text().splitlines())
        for word in ("float", "double", "malloc", "new ", "std::"):
            assert word not in code, f"{word} in {path.name}"


def test_every_port_moves_whole_words() -> None:
    """A loop that reads or writes a port moves what it is typed as: in the emitted C++, a word of its width."""
    top = top_text(dict.fromkeys(PORT_BUNDLES, 1), 128)
    declared = {name: kind for kind, name in re.findall(r"((?:vit_words::)?\w+) \*(\w+)", TOP_ARGUMENTS)}
    assert set(declared) == set(PORT_BUNDLES)
    for name, kind in declared.items():
        assert f"port={name} " in top and kind.startswith("vit_words::"), f"{kind} *{name}"
    for path in (INCLUDE / "engine").glob("m3vit_engine_*.h"):
        text = "\n".join(line.split("//")[0] for line in path.read_text().splitlines())
        for kind, name in re.findall(r"([\w:<>, ]*?[\w>]) \*(\w+)[,)]", text):
            if name in PORT_BUNDLES or name == "narrow":
                assert "words<C>::" in kind or "word<w_t" in kind, f"{path.name}: {kind} *{name}"


def test_integer_functions_are_those_of_the_headers(tmp_path: Path) -> None:
    binary = tmp_path / "integers"
    source = ROOT / "tests" / "hw" / "csim" / "integers.cpp"
    subprocess.run([csim.find_compiler(), *STRICT, "-O1", f"-I{INCLUDE}", str(source), "-o", str(binary)], check=True)
    rng = np.random.default_rng(0)
    big = (2.0 ** rng.uniform(0, 61, 400)).astype(np.int64)
    edges = np.array([1, 2, 3, (1 << 24) - 1, 1 << 24, (1 << 53) - 1, (1 << 53) + 1, (1 << 54) - 1, (1 << 62) - 1])
    positive = np.concatenate([big, edges])
    signed = np.concatenate([rng.integers(-(1 << 47), 1 << 47, 200), [-3, -1, 0, 1, 3]])
    scores = rng.integers(0, 30 << 12, 300)
    narrow = np.concatenate([rng.integers(-(1 << 15), 1 << 15, 300), [-(1 << 15), (1 << 15) - 1, 0]])
    cases: list[tuple[str, np.ndarray, int, int, Callable[[], object]]] = [
        ("shift_round", signed, 9, 0, lambda: arithmetic.shift_round(signed, 9)),
        ("shift_round", signed, 0, 0, lambda: arithmetic.shift_round(signed, 0)),
        ("shift_round", signed, -5, 0, lambda: arithmetic.shift_round(signed, -5)),
        ("exp2_neg", scores, 12, 17, lambda: arithmetic.exp2_neg(scores, 12, 17)),
        ("exp2_neg", scores << 14, 26, 17, lambda: arithmetic.exp2_neg(scores << 14, 26, 17)),
        ("gelu", narrow, 12, 0, lambda: arithmetic.gelu_raw(narrow, 12)),
        ("gelu", narrow, 22, 0, lambda: arithmetic.gelu_raw(narrow, 22)),
        ("gelu", narrow, 24, 0, lambda: arithmetic.gelu_raw(narrow, 24)),
        ("reciprocal", positive, 0, 0, lambda: np.stack(arithmetic.reciprocal(positive), 1)),
        ("rsqrt", positive, 0, 0, lambda: np.stack(arithmetic.rsqrt(positive), 1)),
    ]
    for name, values, a, b, function in cases:
        text = "".join(f"{name} {value} {a} {b}\n" for value in values)
        printed = subprocess.run([str(binary)], input=text, capture_output=True, text=True, check=True).stdout
        np.testing.assert_array_equal(np.array(printed.split(), np.int64), np.ravel(function()), err_msg=name)


def test_two_products_a_multiplier_are_exact(tmp_path: Path) -> None:
    """Every pair of weights at the ends of the inputs' range, and every combination of signs and ends."""
    binary, source = tmp_path / "packed", ROOT / "tests" / "hw" / "csim" / "packed.cpp"
    paths = [f"-I{INCLUDE}", f"-I{INCLUDE / 'engine'}"]
    subprocess.run([csim.find_compiler(), *STRICT, "-O2", *paths, str(source), "-o", str(binary)], check=True)
    different, compared = subprocess.run([str(binary)], capture_output=True, text=True, check=True).stdout.split()
    assert int(different) == 0 and int(compared) > 2_000_000


def test_accumulators_of_the_width_synthesis_gets(builds: Builds, tmp_path: Path) -> None:
    """With ap_int<48> for the sums (hls4ml's ap_types): the same words."""
    flags = ["-O1", "-DM3VIT_AP_INT", "-isystem", str(AP_TYPES), "-Wno-uninitialized", "-Wno-maybe-uninitialized"]
    narrow = Simulator.build(tmp_path / "build", HARDWARE, flags)
    for seed in (0, 3):  # w16a16
        shape = random_shape(seed)
        image, _ = random_vit(shape, seed)
        frames, tasks = frames_of(shape, shape.tasks, seed), list(range(shape.tasks))
        expected, counters, _ = builds["w16a16"][0].run(tmp_path / "wide", image, frames, tasks)
        outputs, counters_too, _ = narrow.run(tmp_path / "narrow", image, frames, tasks)
        np.testing.assert_array_equal(outputs, expected)
        assert counters == counters_too


def random_shape(seed: int) -> Shape:
    """Sizes at random: tokens around the blocks of attention, odd widths, 4 to 256 experts, k 1 to 8."""
    rng = np.random.default_rng(seed)
    name = list(FORMATS)[seed % len(FORMATS)]
    (weight_bits, act_bits), pixels = FORMATS[name], hardware_of(name).pixels
    heads = int(rng.integers(1, 5))
    experts = int(rng.choice([4, 5, 16, 33, 256]))
    return Shape(
        grid=(int(rng.integers(1, 12)), int(rng.integers(1, 16))),
        patch=int(rng.choice({1: [1, 2, 5], 2: [2, 4, 6], 4: [4]}[pixels])),
        prefix=int(rng.integers(0, 3)),
        dim=heads * int(rng.integers(2, 15)),
        depth=int(rng.integers(1, 4)),
        heads=heads,
        mlp=int(rng.integers(1, 96)),
        experts=experts,
        top_k=int(rng.integers(1, min(experts, 8) + 1)),
        hidden=int(rng.integers(1, 50)),
        tasks=int(rng.integers(1, 4)),
        act_bits=act_bits,
        weight_bits=weight_bits,
        finer=int(rng.choice([0, 0, 2])),
        upscale=int(rng.choice([0, 1, 2])),
        unrectified=seed % 6,
    )


@pytest.mark.parametrize("seed", range(12))
def test_random_models_word_for_word(builds: Builds, tmp_path: Path, seed: int) -> None:
    check_words(builds, random_shape(seed), tmp_path, seed)


def test_wide_ports_word_for_word(tmp_path: Path) -> None:
    """Ports of 256 bits, 32 narrow results a cycle, softmax of two queries at once; a residual stream of 16 bits, which
    holds all values, or not."""
    simulator = Simulator.build(tmp_path / "build", WIDE, ["-O1"])
    wide = Shape(grid=(7, 11), dim=120, heads=3, mlp=96, weight_bits=8, act_bits=8)  # heads of 40 channels
    # Of qkv's three tiles the last is folded, for inputs of one byte and of two, of an even and an odd number of steps.
    fine = replace(wide, fine=frozenset({"blocks.0.attn.qkv", "blocks.1.mlp.fc1", "blocks.1.mlp.fc2", "heads.linear"}))
    odd = replace(wide, dim=72, fine=frozenset(names_of_maps(range(2), conv=False)))
    for seed, shape in enumerate([random_shape(1), random_shape(10), wide, fine, odd]):
        (folder := tmp_path / str(seed)).mkdir()
        shape.wide_bits, shape.wide_frac = 16, 12 if seed else 8
        check_words({"w8a8": [simulator]}, shape, folder, seed, WIDE.port_bits)


@pytest.mark.parametrize("seed", range(4))
def test_inputs_of_two_bytes_word_for_word(builds: Builds, tmp_path: Path, seed: int) -> None:
    """Random maps of random models, and (seed 0) all of one with convolutions."""
    shape, rng = random_shape(1 + 3 * seed), np.random.default_rng(seed)  # those of 8 bits
    if seed == 0:
        shape.grid, shape.upscale = (5, 6), 2
    names = names_of_maps(range(shape.depth), shape.upscale > 0)
    shape.fine = frozenset(name for name in names if seed == 0 or rng.random() < 0.5)
    image, limits = random_vit(shape, seed)
    assert image.two_bytes and 0 < limits["max_bytes"] <= hardware_of("w8a8").max_bytes
    check_words(builds, shape, tmp_path, seed)


@pytest.mark.parametrize("name", FORMATS)
def test_every_instruction_word_for_word(builds: Builds, tmp_path: Path, name: str) -> None:
    """The program cut off after each instruction: what it wrote, in C++ and in the emulator."""
    weight_bits, act_bits = FORMATS[name]
    shape = Shape(grid=(6, 12), depth=2, weight_bits=weight_bits, act_bits=act_bits, tasks=2)
    image, _ = random_vit(shape)
    (frame,) = frames_of(shape, 1)
    emulator, kind = Emulator(image), np.int8 if act_bits == 8 else np.int16
    compared = 0
    instruction: Any
    for pc, instruction in enumerate(image.program):
        mode = getattr(instruction, "mode", None)
        cut = replace(image, params=image.params.copy())
        cut.params[(pc + 1) * WORDS : (pc + 2) * WORDS] = End().encode()
        outputs, _, _ = builds[name][0].run(tmp_path, cut, frame[None], [1])
        state = emulator.state_after(frame, 1, pc + 1)
        np.testing.assert_array_equal(outputs[0], state.output.numpy())
        narrow_size = image.memory.narrow * kind().itemsize
        narrow = np.fromfile(tmp_path / "memories.bin", kind, image.memory.narrow)
        wide = np.fromfile(tmp_path / "memories.bin", np.int32, offset=narrow_size)
        if instruction.op == Op.ROUTE or instruction.task == 0 or mode == Mode.OUTPUT:
            continue
        in_narrow = instruction.op in (Op.IMAGE, Op.ATTENTION) or (
            instruction.op in (Op.LINEAR, Op.NORM) and mode == Mode.NARROW
        )
        rows = instruction.dst + np.arange(instruction.rows)[:, None] * instruction.dst_pitch
        # Of rows that are filled up to steps of the array, what the network has.
        width = instruction.n_in if instruction.op == Op.IMAGE else instruction.n_out
        places = rows + np.arange(shape.dim if instruction.op in (Op.POSITION, Op.EXPERTS) else width)
        written, wanted = (narrow, state.narrow) if in_narrow else (wide, state.wide)
        np.testing.assert_array_equal(written[places], wanted.numpy()[places], err_msg=f"{pc}: {instruction}")
        compared += 1
    assert compared == len(image.program) - 4  # but for the queues, the other task's gate, and two heads


def test_random_shapes_cover_the_range() -> None:
    shapes = [random_shape(seed) for seed in range(12)]
    assert {shape.experts for shape in shapes} >= {4, 256} and {shape.top_k for shape in shapes} >= {1, 8}
    tokens = [shape.grid[0] * shape.grid[1] + shape.prefix for shape in shapes]
    assert min(tokens) < 64 < 128 < max(tokens)


def test_coarse_formats_word_for_word(builds: Builds, tmp_path: Path) -> None:
    """Fractions below 0, as huge activations get: shifts to the left in every engine."""
    outputs, _ = check_words(builds, Shape(grid=(6, 9), finer=-12, wide_frac=4), tmp_path)
    assert outputs.any()


@pytest.mark.parametrize("name", FORMATS)
def test_saturation_is_counted_alike(builds: Builds, tmp_path: Path, name: str) -> None:
    weight_bits, act_bits = FORMATS[name]
    shape = Shape(weight_bits=weight_bits, act_bits=act_bits, finer=4, wide_frac=28)
    _, counters = check_words(builds, shape, tmp_path)
    engines = {line["pc"] for line in counters if line["saturated"]}
    assert len(engines) > 5


def norm_of(table: np.ndarray, frac: int, wide_frac: int, eps: float = 1e-6) -> Image:
    """A program of one LayerNorm: prefix tokens are the input, an identity head lets the result out."""
    rows, dim = table.shape
    scheduler = Scheduler(1, 16, 16, wide_frac)
    x = scheduler.embed("embed", scheduler.image((1, 1), 1), np.zeros((dim, 3)), np.zeros(dim), rows - 1)
    x = scheduler.position("position", x, table, rows)
    y = scheduler.norm("norm", x, np.ones(dim), np.zeros(dim), eps, frac)
    scheduler.head("head", y, [(np.eye(dim), np.zeros(dim))], [frac])
    return scheduler.build()


PIXEL = np.zeros((1, 1, 3), np.uint8)


@pytest.mark.parametrize("std", [1e-3, 0.1, 1.0, 40.0, 3000.0])
def test_layernorm_at_any_variance(builds: Builds, tmp_path: Path, std: float) -> None:
    rng = np.random.default_rng(0)
    dim, wide_frac = 48, 20 if std < 100 else 16
    table = rng.normal(rng.normal(0, std, (20, 1)), std, (20, dim))
    table[3] = std * 0.7  # constant: the variance is 0
    table[4, 5] = 400 * std if std < 30 else 5 * std  # an outlier channel
    image = norm_of(table, 12, wide_frac)
    result = Emulator(image).run(PIXEL, 0)
    outputs, _, _ = builds["w16a16"][0].run(tmp_path, image, PIXEL[None], [0])
    np.testing.assert_array_equal(outputs[0], result.outputs)
    rounded = torch.from_numpy(np.round(table * 2.0**wide_frac) * 2.0**-wide_frac)
    expected = F.layer_norm(rounded, (dim,), eps=1e-6).numpy()
    # Half an LSB of the result; tables of 1/sqrt, relative to at most sqrt(48).
    np.testing.assert_allclose(result.outputs.reshape(20, dim) * 2.0**-12, expected, atol=2.0**-13 + 7e-5, rtol=0)


@pytest.mark.parametrize(("tokens", "std"), [(20, 1.0), (64, 1.0), (65, 4.0), (150, 0.2), (150, 4.0)])
def test_attention_is_softmax_attention(tokens: int, std: float) -> None:
    """The online softmax over blocks of 64 keys against torch's, on the values that the engine reads."""
    rng = np.random.default_rng(tokens)
    heads, dim, frac = 3, 24, 11
    scheduler = Scheduler(1, 16, 16, 16)
    x = scheduler.embed("embed", scheduler.image((1, 1), 1), np.zeros((dim, 3)), np.zeros(dim), tokens - 1)
    x = scheduler.position("position", x, rng.normal(0, 1, (tokens, dim)), tokens)
    y = scheduler.norm("norm", x, np.ones(dim), np.zeros(dim), 1e-6, 12)
    weight = rng.normal(0, std / math.sqrt(dim), (3 * dim, dim))
    qkv = scheduler.linear("qkv", y, weight, np.zeros(3 * dim), np.array([frac, frac, frac]))
    seen = scheduler.attention("attention", qkv, heads, frac)
    scheduler.head("head", seen, [(np.eye(dim), np.zeros(dim))], [frac])
    emulator = Emulator(scheduler.build())
    captured = []
    original = emulator._attention

    def capture(state: object, pc: int, i: object) -> None:
        rows: Any = emulator.program[pc]
        seen = state.narrow.as_strided((tokens, 3 * dim), (rows.src_pitch, 1), rows.src)  # type: ignore[attr-defined]
        captured.append(seen.clone())
        original(state, pc, i)  # type: ignore[arg-type]

    emulator._attention = capture  # type: ignore[assignment,method-assign]
    outputs = emulator.run(PIXEL, 0).outputs.reshape(tokens, dim) * 2.0**-frac
    values = captured[0].view(tokens, 3, heads, dim // heads) * 2.0**-frac
    q, k, v = values.permute(1, 2, 0, 3)
    weights = torch.softmax(q @ k.transpose(1, 2) * math.log(2), dim=-1)
    expected = (weights @ v).transpose(0, 1).reshape(tokens, dim).numpy()
    # Scores are rounded to 2^-12 (relative error of a weight 8.5e-5); weights to 2^-17, of a sum of at least 1/2.
    atol = float(v.abs().max()) * (2e-4 + tokens * 2.0**-17) + 2.0**-12
    np.testing.assert_allclose(outputs, expected, atol=atol, rtol=0)


def test_router_is_softmax_then_top_k_with_ties_to_the_lowest() -> None:
    rng = np.random.default_rng(0)
    rows, experts, frac = 50, 9, 20
    logits = rng.integers(-4, 5, (rows, experts)) << 19  # 9 values for 9 experts: ties
    image, _ = random_vit(Shape())
    emulator = Emulator(image)
    state = type("State", (), {"wide": torch.from_numpy(logits.ravel()).double(), "expert_ids": []})()
    emulator._route(state, Route(rows=rows, n_in=experts, src_pitch=experts, top_k=3, logit_frac=frac))
    np.testing.assert_array_equal(state.experts, np.argsort(-logits, axis=1, kind="stable")[:, :3])
    expected = 2.0 ** (logits * 2.0**-frac)
    expected = np.take_along_axis(expected / expected.sum(1, keepdims=True), state.experts, axis=1)
    np.testing.assert_allclose(state.scores * 2.0**-17, expected, atol=2e-5)


# --- tasks and experts ----------------------------------------------------------------------------------------------


def test_tasks_switch_between_frames(builds: Builds, tmp_path: Path) -> None:
    """Alternating tasks give what runs of one task give; and only the gates' and the heads' traffic differ."""
    # Top-4 of 4: every expert has tokens. Else a task that uses fewer experts loads fewer, in whichever order.
    shape = Shape(grid=(8, 8), tasks=3, depth=4, experts=4, top_k=4)
    image, _ = random_vit(shape)
    frames, simulator = frames_of(shape, 6), builds["w16a16"][0]
    order = [0, 1, 2, 1, 0, 2]
    mixed, counters, _ = simulator.run(tmp_path / "mixed", image, frames, order)
    for task in range(3):
        alone, _, _ = simulator.run(tmp_path / str(task), image, frames, [task] * 6)
        chosen = [place for place, wanted in enumerate(order) if wanted == task]
        np.testing.assert_array_equal(mixed[chosen], alone[chosen])
        assert (mixed[chosen] != 0).any()
    unknown, _, _ = simulator.run(tmp_path / "unknown", image, frames[:1], [200])
    np.testing.assert_array_equal(unknown[0], mixed[0])
    program: list[Any] = image.program
    by_frame = [{line["pc"]: line for line in counters if line["frame"] == frame} for frame in range(6)]
    for pc, instruction in enumerate(program):
        words = [tuple(frame[pc][port] for port in PORTS) for frame in by_frame]
        if instruction.task < 0:
            assert len(set(words)) == 1, f"{instruction} moves other data for another task"
        else:
            assert instruction.op == Op.GATE or instruction.n_out == 3 + 4 * instruction.task
            for frame, task in enumerate(order):  # of another task, the instruction itself is all that is read
                assert (sum(words[frame]) == 96) == (task != instruction.task)
    gates = [sum(line["gates"] for line in frame.values()) for frame in by_frame]
    assert len(set(gates)) == 1  # one router for each layer, whichever it is


def test_each_used_expert_is_loaded_once(builds: Builds, tmp_path: Path) -> None:
    shape = Shape(grid=(5, 5), prefix=0, experts=33, top_k=2, tasks=1)
    image, _ = random_vit(shape)
    _, counters, routing = builds["w16a16"][0].run(tmp_path, image, frames_of(shape, 1), [0])
    place = [instruction.op for instruction in image.program].index(Op.EXPERTS)
    experts = counters[place]
    used = len(np.unique(routing))
    assert experts["expert_loads"] == used < 33
    # At most 25 tokens each: one block. 24 channels and 20 hidden ones fill 32 places.
    assert experts["weights"] == used * 2 * 32 * 32 * 2


@pytest.mark.parametrize("experts", [4, 16, 64, 256])
def test_any_number_of_experts_in_the_same_buffers(builds: Builds, tmp_path: Path, experts: int) -> None:
    check_words(builds, Shape(grid=(6, 7), experts=experts, top_k=4, tasks=2), tmp_path)  # one binary for all
    few, many = (memories(replace(HARDWARE, max_experts=n)) for n in (4, experts))
    changed = [(a, b) for a, b in zip(few, many, strict=True) if a != b]
    # The logits of 4 tokens, 4 in a word; counts, starts and the list of active experts: 16 bits an expert each.
    grown = [((4, 128, 1), (4, 128, experts // 4)), ((3, 16, 4), (3, 16, experts))]
    assert [(a[1:4], b[1:4]) for a, b in changed] == (grown if experts > 4 else [])


# --- sizes of the paper ----------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_edge_moe_size(tmp_path: Path) -> None:
    """129 tokens of 192 channels, 12 layers, 16 experts of 384, top-2: the whole network, word for word."""
    shape = Shape(grid=(8, 16), patch=16, dim=192, depth=12, heads=3, mlp=768, experts=16, top_k=2, hidden=384, tasks=2)
    image, limits = random_vit(shape)
    hardware = Hardware(16, 16, 32, **limits)
    simulator = Simulator.build(tmp_path / "build", hardware, ["-O2"])
    frames = frames_of(shape, 2)
    outputs, _, _ = simulator.run(tmp_path / "run", image, frames, [0, 1])
    emulator = Emulator(image)
    for task, frame in enumerate(frames):
        np.testing.assert_array_equal(emulator.run(frame, task).outputs, outputs[task])


def test_emulator_shares_what_no_task_changes() -> None:
    shape = Shape(depth=4)
    image, _ = random_vit(shape)
    (frame,) = frames_of(shape, 1)
    emulator = Emulator(image)
    together = emulator.run_tasks(frame, [2, 0, 1])
    for task, result in zip([2, 0, 1], together, strict=True):
        alone = emulator.run(frame, task)
        np.testing.assert_array_equal(alone.outputs, result.outputs)
        assert alone.saturated == result.saturated


def test_inputs_pass_once_and_weights_once_a_block(builds: Builds, tmp_path: Path) -> None:
    shape = Shape(grid=(9, 11), prefix=1, depth=1, tasks=1)  # 100 tokens: 4 blocks of 32
    image, _ = random_vit(shape)
    _, counters, _ = builds["w16a16"][0].run(tmp_path, image, frames_of(shape, 1), [0])
    blocks = math.ceil(100 / HARDWARE.token_block)
    for instruction, line in zip(image.program, counters, strict=False):
        if instruction.op == Op.LINEAR and instruction.rows == 100:
            assert line["narrow_read"] == 100 * instruction.n_in * 2
            assert line["weights"] == blocks * instruction.n_in * instruction.n_out * 2
