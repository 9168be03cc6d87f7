"""Parts of the multiplexed schedule by themselves: the weights file, buffers, quantised maps."""

from pathlib import Path

import numpy as np
import pytest

from m3vit.errors import InputError
from m3vit.export.hls.multiplexed.words import linear_words, norm_words, row_fracs
from m3vit.hw.isa import End, Mode, Norm, decode
from m3vit.hw.program import Image, Memory, allocate


def test_instructions_and_images_survive_their_file(tmp_path: Path) -> None:
    places = {"src": 1 << 30, "src_pitch": 9, "dst": 3, "dst_pitch": 2, "params": 4}
    scaling = {"shift": -5, "bias_shift": 6, "sqrt_dim": 7, "eps": (1 << 59) + 12345}
    instruction = Norm(rows=5, n_in=6, n_out=7, mode=Mode.WIDE, **places, **scaling)
    assert decode(instruction.encode()) == instruction
    params = np.concatenate([instruction.encode(), End().encode(), np.arange(5, dtype=np.int32)])
    image = Image(params, np.arange(-7, 70, dtype=np.int8), np.zeros(0, np.int16), Memory(1, 2, 3, 4, 5), 8)
    image.write(tmp_path / "weights.bin")
    back = Image.read(tmp_path / "weights.bin")
    for name in ("params", "weights", "gates"):
        np.testing.assert_array_equal(getattr(back, name), getattr(image, name))
    assert back.memory == image.memory and back.act_bits == 8 and back.program == [instruction]


@pytest.mark.parametrize("seed", range(5))
def test_buffers_in_use_do_not_overlap(seed: int) -> None:
    rng = np.random.default_rng(seed)
    first = rng.integers(0, 30, 40)
    buffers = [(int(rng.integers(1, 500)), int(a), int(a + rng.integers(0, 6))) for a in np.sort(first)]
    offsets, size = allocate(buffers)
    for i, (size_i, start_i, end_i) in enumerate(buffers):
        assert offsets[i] + size_i <= size
        for j, (size_j, start_j, end_j) in enumerate(buffers[:i]):
            if start_i <= end_j and start_j <= end_i:
                assert offsets[i] >= offsets[j] + size_j or offsets[j] >= offsets[i] + size_i
    assert size < sum(size for size, *_ in buffers)  # places are used again


def test_row_fractions_have_the_smaller_error() -> None:
    rng = np.random.default_rng(0)
    weight = rng.standard_t(3, (50, 64))
    fracs = row_fracs(weight, 8)
    for row, frac in zip(weight, fracs, strict=True):

        def error(f: int, row: np.ndarray = row) -> float:
            return float(((np.clip(np.floor(row * 2.0**f + 0.5), -127, 127) * 2.0**-f - row) ** 2).sum())

        holds = int(7 - np.ceil(np.log2(np.abs(row).max())))
        assert frac in (holds, holds + 1) and error(int(frac)) <= min(error(holds), error(holds + 1)) * (1 + 1e-9)
    assert {int(f - (7 - np.ceil(np.log2(np.abs(r).max())))) for r, f in zip(weight, fracs, strict=True)} == {0, 1}


def test_quantised_maps_are_near_the_float_ones() -> None:
    rng = np.random.default_rng(1)
    weight, bias, x = rng.normal(0, 0.1, (7, 30)), rng.normal(0, 5, 7), rng.integers(-(1 << 15), 1 << 15, 30)
    words = linear_words(weight, bias, 16, (16, 13), 20, "test")
    rows = words.params.reshape(7, 2).astype(np.int64)
    sums = words.weights @ x + (rows[:, 0] << (rows[:, 1] >> 8 & 63))
    assert int(np.abs(sums).max()).bit_length() < words.sum_bits <= 48
    y = np.floor(sums * 2.0 ** -((rows[:, 1] & 255) - 64) + 0.5) * 2.0**-20
    np.testing.assert_allclose(y, weight @ (x * 2.0**-13) + bias, atol=30 * 4 * 2.0**-17)
    with pytest.raises(InputError, match=r"a huge layer needs 6[0-9]-bit sums"):
        linear_words(np.ones((1, 1 << 20)), np.full(1, 2.0**30), 16, (16, 14), 20, "a huge layer")
    # Inputs up to 2^13 in 8 bits: sums of 4 * 100 * 2^7 have 17 bits, and are shifted left by 26; by 46 is too far.
    coarse, none = np.full((1, 4), 100.0), np.zeros(1)
    assert linear_words(coarse, none, 8, (8, -6), 20, "test").sum_bits == 17
    with pytest.raises(InputError, match=r"coarse needs 17-bit sums shifted by -46, .* 62 with the shift"):
        linear_words(coarse, none, 8, (8, -6), 40, "coarse")
    with pytest.raises(InputError, match="not finite"):
        linear_words(np.full((1, 2), np.nan), np.zeros(1), 16, (16, 13), 20, "test")
    assert norm_words(np.ones(8), np.zeros(8), 0.0, 20, 12, 18).eps == 1  # never 0: its square root is divided by
