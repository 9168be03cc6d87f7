"""The HLS kernels of hw/include, C-simulated one by one against torch or numpy."""

import math
import subprocess
from collections.abc import Callable, Sequence
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from m3vit.hw import tables
from m3vit.hw.sim import csim

pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parents[2]
INCLUDE = ROOT / "hw" / "include"
SPEC = find_spec("hls4ml")
assert SPEC is not None and SPEC.submodule_search_locations is not None
TEMPLATES = Path(SPEC.submodule_search_locations[0]) / "templates" / "vivado"
AP_TYPES = TEMPLATES / "ap_types"
# The kernels are to be free of warnings, but g++ knows neither HLS pragmas nor why loops have labels (for HLS reports).
STRICT = ["-std=c++11", "-Wall", "-Wextra", "-Werror", "-Wno-unknown-pragmas", "-Wno-unused-label"]
STRICT += ["-isystem", str(AP_TYPES)]  # these warn by the page

# Sizes and formats of tests/hw/csim/kernels.cpp.
T, D, H, E, K, R = 24, 12, 8, 5, 2, 3
DATA_LSB, WEIGHT_LSB, BIAS_LSB = 2.0**-12, 2.0**-13, 2.0**-17

Kernel = Callable[..., np.ndarray]


def quantise(values: np.ndarray, lsb: float) -> np.ndarray:
    """Round to the grid of a format, as AP_RND does."""
    return np.floor(values / lsb + 0.5) * lsb


@pytest.fixture(scope="session")
def drivers(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """The test driver built at -O0 and at -O2."""
    source, folder = Path(__file__).parent / "csim" / "kernels.cpp", tmp_path_factory.mktemp("kernels")
    built = []
    for level in ("-O0", "-O2"):
        binary = folder / f"kernels{level}"
        quiet = ["-Wno-uninitialized", "-Wno-maybe-uninitialized"]  # ap_types, once inlined
        command = [csim.find_compiler(), *STRICT, *quiet, level, f"-I{INCLUDE}", str(source), "-o", str(binary)]
        subprocess.run(command, check=True)
        built.append(binary)
    return built


@pytest.fixture
def kernel(drivers: list[Path]) -> Kernel:
    """Run a kernel with arrays as arguments, at -O0 and -O2 alike, and return its flat output."""

    def run(name: str, *arguments: np.ndarray | Sequence[int] | int, env: dict[str, str] | None = None) -> np.ndarray:
        numbers = (repr(float(x)) if x % 1 else str(int(x)) for a in arguments for x in np.ravel(a))
        text = " ".join([name, *numbers])
        printed = [
            subprocess.run([str(d)], input=text, capture_output=True, text=True, check=True, env=env) for d in drivers
        ]
        # Edge-MoE's top-k was right at -O0 and wrong at -O2 when rebuilt for a host: hence both.
        assert printed[0].stdout == printed[1].stdout
        return np.array(printed[0].stdout.split(), dtype=np.float64)

    return run


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(0)


@pytest.mark.parametrize("header", sorted(path.name for path in INCLUDE.glob("*.h")))
def test_header_stands_alone(header: str, tmp_path: Path) -> None:
    source = tmp_path / "twice.cpp"
    source.write_text(f'#include "{header}"\n#include "{header}"\n')
    subprocess.run([csim.find_compiler(), *STRICT, "-fsyntax-only", f"-I{INCLUDE}", str(source)], check=True)


def test_header_of_hls4mls_own_dense_kernel_compiles(tmp_path: Path) -> None:
    source = tmp_path / "dense.cpp"
    source.write_text('#define M3VIT_HLS4ML_DENSE\n#include "m3vit_dense.h"\n')
    paths = ["-isystem", str(TEMPLATES / "nnet_utils"), f"-I{INCLUDE}"]
    subprocess.run([csim.find_compiler(), *STRICT, "-fsyntax-only", *paths, str(source)], check=True)


def test_tables_are_those_of_the_generator() -> None:
    assert (INCLUDE / tables.HEADER).read_text() == tables.header_text()


def test_no_float_in_the_headers() -> None:
    for path in INCLUDE.glob("*.h"):
        code = "\n".join(line.split("//")[0] for line in path.read_text().splitlines())
        assert "float" not in code and "double" not in code, path.name


def test_gelu(kernel: Kernel, rng: np.random.Generator) -> None:
    x = quantise(np.concatenate([rng.normal(0, 2, (T - 2, D)), rng.uniform(-128, 128, (2, D))]), DATA_LSB)
    expected = F.gelu(torch.from_numpy(x)).numpy()
    # 6e-6: interpolation of the table; 2^-17: rounding of the result.
    np.testing.assert_allclose(kernel("gelu", x).reshape(T, D), expected, atol=7e-6 + 2**-17, rtol=0)


def test_linear_is_exact_until_its_result_is_rounded_and_saturated(kernel: Kernel, rng: np.random.Generator) -> None:
    x = quantise(rng.uniform(-60, 60, (T, D)), DATA_LSB)
    weight = quantise(rng.normal(0, 1, (7, D)), WEIGHT_LSB)
    bias = quantise(rng.normal(0, 1, 7), BIAS_LSB)
    exact = F.linear(*map(torch.from_numpy, (x, weight, bias))).numpy()  # float64 holds every product and sum
    assert (np.abs(exact) > 128).any(), "some results are beyond ap_fixed<20, 8>"
    expected = quantise(exact, DATA_LSB).clip(-128, 128 - DATA_LSB)
    np.testing.assert_array_equal(kernel("linear", weight, bias, x).reshape(T, 7), expected)


@pytest.mark.parametrize("std", [0.01, 0.1, 1.0, 5.0, 30.0])
def test_layernorm_at_any_variance(kernel: Kernel, rng: np.random.Generator, std: float) -> None:
    x = quantise(rng.normal(rng.normal(0, std, (T, 1)), std, (T, D)).clip(-127, 127), DATA_LSB)
    scale = quantise(rng.normal(1, 0.3, D), WEIGHT_LSB)
    bias = quantise(rng.normal(0, 0.5, D), BIAS_LSB)
    expected = F.layer_norm(*map(torch.from_numpy, (x,)), (D,), torch.from_numpy(scale), torch.from_numpy(bias), 1e-6)
    # 4e-6: table of 1/sqrt, times a normalised value up to sqrt(12) and a scale up to 2; 2^-17: rounding of the result.
    np.testing.assert_allclose(kernel("layernorm", scale, bias, x).reshape(T, D), expected, atol=3e-5 + 2**-17, rtol=0)


def test_layernorm_of_a_constant_token_is_its_bias(kernel: Kernel) -> None:
    bias = quantise(np.linspace(-1, 1, D), BIAS_LSB)
    y = kernel("layernorm", np.ones(D), bias, np.full((T, D), 3.0)).reshape(T, D)
    # 2^-17: rounding of the result, whose LSB is 2^-16.
    np.testing.assert_allclose(y, np.tile(bias, (T, 1)), atol=2**-17, rtol=0)


def test_position_adds_and_puts_constant_tokens_first(kernel: Kernel, rng: np.random.Generator) -> None:
    x = quantise(rng.normal(0, 3, (T - 2, D)), DATA_LSB)
    table = quantise(rng.normal(0, 0.5, (T, D)), BIAS_LSB)
    expected = quantise(table + np.concatenate([np.zeros((2, D)), x]), 2**-16)
    np.testing.assert_array_equal(kernel("position", table, x).reshape(T, D), expected)


@pytest.mark.parametrize("std", [0.1, 1.0, 4.0])
def test_attention(kernel: Kernel, rng: np.random.Generator, std: float) -> None:
    qkv = quantise(rng.normal(0, std, (T, 3 * D)), DATA_LSB)
    q, k, v = torch.from_numpy(qkv).view(T, 3, 3, D // 3).permute(1, 2, 0, 3)
    weights = torch.softmax(q @ k.transpose(-2, -1) * math.log(2), dim=-1)
    expected = (weights @ v).transpose(0, 1).reshape(T, D).numpy()
    # Each of 24 weights is rounded to 2^-17 (error 2^-18), relative to a sum of at least 1, times |v| <= 4 std; 8e-6:
    # tables of exp2 and 1/x; 2^-17: rounding of the result.
    atol = 4 * std * (2 * T * 2**-18 + 8e-6) + 2**-17
    np.testing.assert_allclose(kernel("attention", qkv).reshape(T, D), expected, atol=atol, rtol=0)


def moe_weights(rng: np.random.Generator) -> dict[str, np.ndarray]:
    """Random weights on the grids of their formats, by the names of the kernel's arguments."""
    return {
        "router_w": quantise(rng.normal(0, 0.5, (R, E, D)), WEIGHT_LSB),
        "router_b": quantise(rng.normal(0, 0.3, (R, E)), BIAS_LSB),
        "w1": quantise(rng.normal(0, 0.4, (E, H, D)), WEIGHT_LSB),
        "b1": quantise(rng.normal(0, 0.2, (E, H)), BIAS_LSB),
        "w2": quantise(rng.normal(0, 0.4, (E, D, H)), WEIGHT_LSB),
        "b2": quantise(rng.normal(0, 0.2, (E, D)), BIAS_LSB),
    }


def moe_reference(x: np.ndarray, task: int, weights: dict[str, np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """Return outputs [T, D] and expert ids [T, K], in float64, ties to the lowest id."""
    logits = x @ weights["router_w"][task].T + weights["router_b"][task]
    ids = np.argsort(-logits, axis=1, kind="stable")[:, :K]
    scores = 2.0 ** (logits - logits.max(axis=1, keepdims=True))
    scores /= scores.sum(axis=1, keepdims=True)
    out = np.zeros_like(x)
    for token in range(len(x)):
        for e in ids[token]:
            hidden = F.gelu(torch.from_numpy(weights["w1"][e] @ x[token] + weights["b1"][e])).numpy()
            out[token] += scores[token, e] * (weights["w2"][e] @ hidden + weights["b2"][e])
    return out, ids


def run_moe(
    kernel: Kernel, x: np.ndarray, task: int, weights: dict[str, np.ndarray], log: Path
) -> tuple[np.ndarray, np.ndarray, int]:
    """Return outputs [T, D], expert ids [T, K] from the routing log, and how many experts' weights were loaded."""
    log.unlink(missing_ok=True)
    printed = kernel("moe", *weights.values(), task, x, env={"M3VIT_ROUTING_LOG": str(log)})
    lines = {line for line in log.read_text().splitlines()}  # -O0 and -O2 log the same
    assert len(lines) == 1
    layer, *ids = lines.pop().split()
    assert layer == "7"
    return printed[:-1].reshape(T, D), np.array(ids, dtype=np.int64).reshape(T, K), int(printed[-1])


@pytest.mark.parametrize("task", range(R))
def test_moe_of_each_task(kernel: Kernel, rng: np.random.Generator, tmp_path: Path, task: int) -> None:
    weights, x = moe_weights(rng), quantise(rng.normal(0, 1, (T, D)), DATA_LSB)
    expected, expected_ids = moe_reference(x, task, weights)
    y, ids, loads = run_moe(kernel, x, task, weights, tmp_path / "log")
    np.testing.assert_array_equal(ids, expected_ids)  # logits are exact, so no tolerance
    # Hidden values and expert outputs are rounded to 2^-12 (error 2^-13 each); 8 hidden ones times |w2| <= 1.6.
    np.testing.assert_allclose(y, expected, atol=(1 + 2 * H * 1.6) * 2**-13, rtol=0)
    # Reordering: each expert in use is loaded once, however many tokens it has.
    assert loads == len(np.unique(ids))


def test_moe_of_an_unknown_task_is_task_0(kernel: Kernel, rng: np.random.Generator, tmp_path: Path) -> None:
    weights, x = moe_weights(rng), quantise(rng.normal(0, 1, (T, D)), DATA_LSB)
    first = run_moe(kernel, x, 0, weights, tmp_path / "log")
    unknown = run_moe(kernel, x, R, weights, tmp_path / "log")
    np.testing.assert_array_equal(first[0], unknown[0])


def test_moe_with_ties_takes_the_lowest_experts_for_all_tokens(
    kernel: Kernel, rng: np.random.Generator, tmp_path: Path
) -> None:
    weights, x = moe_weights(rng), quantise(rng.normal(0, 1, (T, D)), DATA_LSB)
    weights["router_w"][:], weights["router_b"][:] = 0, 0
    y, ids, loads = run_moe(kernel, x, 1, weights, tmp_path / "log")
    np.testing.assert_array_equal(ids, np.tile([0, 1], (T, 1)))
    assert loads == 2  # experts 2, 3, 4 have empty queues
    np.testing.assert_allclose(y, moe_reference(x, 1, weights)[0], atol=(1 + 2 * H * 1.6) * 2**-13, rtol=0)


def test_moe_with_nearly_all_weight_on_one_expert(kernel: Kernel, rng: np.random.Generator, tmp_path: Path) -> None:
    weights, x = moe_weights(rng), quantise(rng.normal(0, 0.1, (T, D)), DATA_LSB)
    weights["router_b"][:] = quantise(np.array([-3.9, -3.9, -3.9, 3.9, -3.9]), BIAS_LSB)
    y, ids, _ = run_moe(kernel, x, 2, weights, tmp_path / "log")
    assert (ids[:, 0] == 3).all()
    np.testing.assert_allclose(y, moe_reference(x, 2, weights)[0], atol=(1 + 2 * H * 1.6) * 2**-13, rtol=0)


def test_task_head_drops_the_prefix_and_pads_with_zeros(kernel: Kernel, rng: np.random.Generator) -> None:
    x = quantise(rng.normal(0, 3, (T, D)), DATA_LSB)
    weight, bias = quantise(rng.normal(0, 0.5, (10, D)), WEIGHT_LSB), quantise(rng.normal(0, 0.5, 10), BIAS_LSB)
    first = (0, 3, 8, 10)
    for task in range(3):
        y = kernel("head", weight, bias, task, x).reshape(T - 1, 5)
        rows = slice(first[task], first[task + 1])
        width = first[task + 1] - first[task]
        expected = F.layer_norm(torch.from_numpy(x[1:]), (D,), eps=1e-6).numpy() @ weight[rows].T + bias[rows]
        # 4e-6: table of 1/sqrt, relative to an output of at most 10; 2^-17: rounding of the result.
        np.testing.assert_allclose(y[:, :width], expected, atol=5e-5 + 2**-17, rtol=0)
        assert not y[:, width:].any()


def test_pixel_head_is_exact_until_its_result_is_rounded_and_saturated(
    kernel: Kernel, rng: np.random.Generator
) -> None:
    """4 x 6 tokens of 2 x 2 pixels with 3 features, the first of which no ReLU cuts off; tasks of 1, 3, 2 channels."""
    x = quantise(rng.uniform(-30, 30, (T, D)), DATA_LSB)
    weight, bias = quantise(rng.normal(0, 0.7, (6, 3, 3, 3)), WEIGHT_LSB), quantise(rng.normal(0, 0.5, 6), BIAS_LSB)
    pixels = torch.from_numpy(x.reshape(4, 6, 2, 2, 3).transpose(4, 0, 2, 1, 3).reshape(1, 3, 8, 12).copy())
    pixels[:, 1:].clamp_(min=0)
    first, largest = (0, 1, 4, 6), 0.0
    for task in range(3):
        rows = slice(first[task], first[task + 1])
        kernels = torch.from_numpy(weight[rows].transpose(0, 3, 1, 2).copy())
        exact = F.conv2d(pixels, kernels, torch.from_numpy(bias[rows]), padding=1).numpy()
        largest = max(largest, float(np.abs(exact).max()))
        by_token = exact.reshape(-1, 4, 2, 6, 2).transpose(1, 3, 2, 4, 0).reshape(T, -1)
        expected = quantise(by_token, DATA_LSB).clip(-128, 128 - DATA_LSB)
        y = kernel("pixel_head", weight, bias, task, x).reshape(T, 12)
        np.testing.assert_array_equal(y[:, : by_token.shape[1]], expected)
        assert not y[:, by_token.shape[1] :].any()
    assert largest > 128, "some results are beyond ap_fixed<20, 8>"


def test_top_k_with_ties(kernel: Kernel, rng: np.random.Generator) -> None:
    logits = rng.integers(-3, 4, (500, 8))  # 7 values for 8 experts: ties in every row
    expected = np.argsort(-logits, axis=1, kind="stable")[:, :3]
    np.testing.assert_array_equal(kernel("top_k", 500, logits).reshape(500, 3), expected)
