"""What multiplies in the emulator, linear maps and attention, each way that it has, against Python's whole numbers."""

import numpy as np
import pytest
import torch

from m3vit.errors import InputError
from m3vit.hw import arithmetic
from m3vit.hw.isa import KEY_BLOCK, MAX_RISE, SCORE_BITS, SCORE_FRAC
from m3vit.hw.sim import attention, linear
from m3vit.hw.sim.attention import attend
from m3vit.hw.sim.emulator import Emulator
from m3vit.hw.sim.linear import Linear
from m3vit.hw.tables import PROB_FRAC
from tests.hw.programs import Shape, frames_of, random_vit


@pytest.fixture(params=["bytes", "floats"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    if request.param == "bytes" and not linear.multiplies_bytes():
        pytest.skip("this processor has no exact and fast products of bytes (AVX512 VNNI)")
    for module in (linear, attention):
        monkeypatch.setattr(module, "multiplies_bytes", lambda: request.param == "bytes")
    return str(request.param)


TWO_BYTES = 17  # in the place of bits: values of two bytes, both from -128 to 127


def of_bits(bits: int, shape: tuple[int, ...], rng: np.random.Generator, extreme: bool) -> np.ndarray:
    low, high = (-128 * 257, 127 * 257) if bits == TWO_BYTES else (-(1 << bits - 1), (1 << bits - 1) - 1)
    return rng.choice([low, high, 0], shape) if extreme else rng.integers(low, high + 1, shape)


def shifted(value: int, shift: int) -> int:
    """Return value * 2^-shift rounded half up."""
    return value << -shift if shift <= 0 else value + (1 << shift - 1) >> shift


@pytest.mark.parametrize("extreme", [False, True])
@pytest.mark.parametrize("bits", [8, 10, 16, TWO_BYTES])
@pytest.mark.parametrize("weight_bits", [8, 12, 16])
@pytest.mark.parametrize(("n", "n_in", "n_out"), [(1, 1, 1), (7, 33, 5), (40, 384, 24)])
def test_a_linear_map_is_exact(
    way: str, bits: int, weight_bits: int, n: int, n_in: int, n_out: int, extreme: bool
) -> None:
    rng = np.random.default_rng(bits * weight_bits + n)
    matrix, x = of_bits(weight_bits, (n_out, n_in), rng, extreme), of_bits(bits, (n, n_in), rng, extreme)
    bias, shift = rng.integers(-(1 << 40), 1 << 40, n_out), rng.integers(-3, 20, n_out)
    sums = x.astype(object) @ matrix.T.astype(object) + bias
    expected = [[shifted(value, s) for value, s in zip(row, shift.tolist(), strict=True)] for row in sums]
    two = bits == TWO_BYTES
    found = Linear(matrix, bias, shift, 8 if two else bits, two)(torch.from_numpy(x).double())
    assert found.dtype == torch.float64 and found.tolist() == expected


def test_sums_over_53_bits_are_refused(way: str) -> None:
    with pytest.raises(InputError, match="over 53 bits"):
        Linear(np.full((1, 4), 127), np.array([1 << 53]), np.array([0]), 8)


def weighted(q: np.ndarray, k: np.ndarray, v: np.ndarray, shift: int, drop: int) -> list[int]:
    """Return the sums of one query's weighted values, and of its weights: q [W], k and v [N, W]."""
    scores = [shifted(value, shift) for value in (k @ q).tolist()]
    most = (1 << SCORE_BITS - 1) - 1
    sums, top = np.zeros(len(q) + 1, object), None
    for start in range(0, len(k), KEY_BLOCK):
        block = np.clip(scores[start : start + KEY_BLOCK], -most - 1, most)
        highest = -(-int(block.max()) >> SCORE_FRAC)
        if top is not None and highest > top:
            fall = min(highest - top, MAX_RISE)
            sums = (sums + (1 << fall - 1)) >> fall
        top = highest if top is None else max(top, highest)
        weights = arithmetic.exp2_neg((top << SCORE_FRAC) - block, SCORE_FRAC, PROB_FRAC - drop) << drop
        values = np.column_stack([v[start : start + KEY_BLOCK], np.ones(len(block), int)])
        sums = sums + weights.astype(object) @ values.astype(object)
    return list(sums)


def test_a_row_of_strides_of_one_is_what_it_is(way: str) -> None:
    """As a column taken for a row, which torch's products of bytes do not see."""
    matrix, x = np.arange(-64, 64).reshape(2, 64), torch.arange(-32.0, 32.0, dtype=torch.float64)
    found = Linear(matrix, np.zeros(2, int), np.zeros(2, int), 8)(x.as_strided((1, 64), (1, 1)))
    assert found.tolist() == [(matrix @ np.arange(-32, 32)).tolist()]
    for shape in ((1, 4, 1), (1, 1, 5), (2, 3, 1), (2, 1, 90)):  # of one token, and of one channel a head
        q = torch.randint(-128, 128, shape[::-1]).double().permute(2, 1, 0)
        sums = attend(q, q, q, 2, 9, 8, lambda scores: scores)
        for head in range(shape[0]):
            one = q[head].T.numpy().astype(int)
            assert sums[head, :, 0].tolist() == weighted(one[0], one, one, 2, 9)


def test_a_map_without_outputs(way: str) -> None:
    none = np.zeros(0, int)
    assert Linear(np.zeros((0, 4), int), none, none, 8)(torch.ones(3, 4, dtype=torch.float64)).shape == (3, 0)


def test_the_largest_sums_of_two_bytes_and_of_weighted_values(way: str) -> None:
    """Just over what float32 holds: were they taken for less, the last bits would be lost."""
    weights, x = np.array([[127, 127, 127, 127, 3]]), torch.tensor([[-32896.0] * 4 + [-32895.0]], dtype=torch.float64)
    found = Linear(weights, np.array([0]), np.array([0]), 8, two=True)(x)
    assert found.tolist() == [[-(508 * 32896 + 3 * 32895)]] and abs(found.item()) > 1 << 24
    rows = 801
    q, k, v = (torch.zeros(1, 8, rows).double() for _ in range(3))
    q[:, 0], k[:, 0], v[:] = 1, -48, -127  # all scores just below a unit, all weights 255 of 2^9
    sums = attend(q, k, v, 2, 9, 8, lambda scores: scores)
    assert (sums[0, 0] == -127 * 255 * rows * 512).all() and 127 * 255 * rows > 1 << 24


@pytest.mark.parametrize(("shift", "width"), [(0, 64), (1, 64), (0, 8), (30, 8), (40, 8)])
def test_bytes_of_wide_heads_reach_high_tops(way: str, shift: int, width: int) -> None:
    """Largest scores of many units of the weights' exponent, rounded already: no half may be added again."""
    rng, rows = np.random.default_rng(shift), 200
    q, k, v = (of_bits(8, (1, rows, width), rng, extreme=False) for _ in range(3))
    k[0, 70:] = np.sort(k[0, 70:], axis=0)
    q[0, :5], k[0, 100:105] = 127, 127  # scores that are whole units of it where `width` and `shift` make them so
    k[0, 105:110] = 127 - np.eye(width, dtype=int)[:5]
    found = attend(*(torch.from_numpy(x).double().transpose(1, 2) for x in (q, k, v)), shift, 9, 8, lambda x: x)
    for row in range(0, rows, 3):
        assert found[0, :, row].tolist() == weighted(q[0, row], k[0], v[0], shift, 9)


@pytest.mark.parametrize(("bits", "drop"), [(8, 9), (8, 0), (16, 0), (16, 3)])
@pytest.mark.parametrize("rises", ["few", "many", "saturated"])
def test_attention_sums_as_one_query_after_the_other(way: str, bits: int, drop: int, rises: str) -> None:
    heads, width, rows = 2, 8, 2 * attention._QUERIES + 60  # three goes, and blocks of keys with some left
    rng = np.random.default_rng(bits + drop)
    q, k, v = (of_bits(bits, (heads, rows, width), rng, extreme=False) for _ in range(3))
    # Of scores within some tens of the units that a weight halves with; saturated: beyond SCORE_BITS.
    shift = {"few": 2 * bits - 14, "many": 2 * bits - 18, "saturated": 2 * bits - 30}[rises]
    if rises == "few":
        k[:, KEY_BLOCK:] //= 4  # the first block has the largest
    clipped = []

    def hold(scores: torch.Tensor) -> torch.Tensor:
        clipped.append(scores.abs().max() >= 1 << SCORE_BITS - 1)
        return scores.clamp_(-(1 << SCORE_BITS - 1), (1 << SCORE_BITS - 1) - 1)

    tensors = (torch.from_numpy(x).double().transpose(1, 2) for x in (q, k, v))
    found = attend(*tensors, shift, drop, bits, hold)
    assert found.shape == (heads, width + 1, rows) and any(clipped) == (rises == "saturated")
    for head in range(heads):
        for row in [0, 1, 63, 64, 350, rows - 1]:
            assert found[head, :, row].tolist() == weighted(q[head, row], k[head], v[head], shift, drop)


@pytest.mark.parametrize("formats", [{"weight_bits": 8, "act_bits": 8}, {"weight_bits": 8, "act_bits": 16}, {}])
def test_the_words_of_a_frame_are_the_same_each_way(monkeypatch: pytest.MonkeyPatch, formats: dict[str, int]) -> None:
    """As it is, with floats alone, and with float64 alone."""
    shape = Shape(dim=24, depth=4, **formats)
    image, _ = random_vit(shape)
    (frame,) = frames_of(shape, 1)
    as_is = Emulator(image)
    frames = [[as_is.run(frame, task).outputs for task in range(shape.tasks)]]
    for module in (linear, attention):
        monkeypatch.setattr(module, "multiplies_bytes", lambda: False)
    kinds = set()
    for exact in ({}, {torch.float32: 0}):
        for module in (linear, attention):
            monkeypatch.setattr(module, "EXACT", linear.EXACT | exact)
        attention._Weights.of.cache_clear()
        emulator = Emulator(image)
        items = [item for item in emulator.prepared.values() for item in (item if isinstance(item, list) else [item])]
        maps = [each for item in items for each in (item if isinstance(item, tuple) else [item])]
        kinds |= {each.weight.dtype for each in maps if isinstance(each, Linear)}
        frames.append([emulator.run(frame, task).outputs for task in range(shape.tasks)])
    attention._Weights.of.cache_clear()
    assert kinds == ({torch.float32, torch.float64} if shape.act_bits == 8 else {torch.float64})
    for others in frames[1:]:
        np.testing.assert_array_equal(frames[0], others)
