"""The emulator's linear maps: exact sums of products of integers, by what torch is fastest at.

Three ways, the same sums: products of bytes with int32 sums, where the processor has instructions for them (AVX512
VNNI), nine times as fast as those of float64; of float32, where no sum reaches 2^24; of float64, where none is 2^53.
"""

from functools import cache

import numpy as np
import torch
from torch import Tensor

from m3vit.errors import InputError

EXACT = {torch.float32: 1 << 24, torch.float64: 1 << 53}  # integers below are exact, and so are their sums


def rounded(x: Tensor, factor: Tensor | float) -> Tensor:
    """Return x * factor rounded half up, in place; factor is a power of two."""
    return x.mul_(factor).add_(0.5).floor_()


@cache
def multiplies_bytes() -> bool:
    """Whether int8 products have exact int32 sums here, fast.

    Without VNNI oneDNN's pairs of products may saturate, and it may be told to do without (ONEDNN_MAX_CPU_ISA).
    """
    known = getattr(torch.cpu, "_is_vnni_supported", None)
    if not hasattr(torch, "_int_mm") or known is None or not known():
        return False
    n = 64
    least, most = torch.full((n, n), -128, dtype=torch.int8), torch.full((n, n), 127, dtype=torch.int8)
    return all(bool((torch._int_mm(x, least) == -128 * n * int(x[0, 0])).all()) for x in (least, most))


def to_bytes(x: Tensor) -> Tensor:
    """Return x as int8, row after row: of a single row with other strides torch._int_mm reads what it is not."""
    return torch.empty(x.shape, dtype=torch.int8).copy_(x)


def _bytes(x: Tensor, count: int) -> list[Tensor]:
    """Return int16 values as `count` int8 tensors: themselves, or 2 with x = 256 * second + first + 128."""
    if count == 1:
        return [to_bytes(x)]
    return [to_bytes((x & 255).sub_(128)), to_bytes(x >> 8)]


class Linear:
    """A linear map with its bias and shift, ready to multiply.

    matrix: int [n_out, n_in]; bias: int64 [n_out]; shift: bits of a sum that its output leaves out, int64 [n_out];
    bits: of an input; two: inputs are two bytes, both from -128 to 127. Raises InputError where sums may be over 53
    bits.
    """

    def __init__(self, matrix: np.ndarray, bias: np.ndarray, shift: np.ndarray, bits: int, two: bool = False) -> None:
        matrix = matrix.astype(np.int64)
        products = np.abs(matrix).sum(axis=1) << (16 if two else bits - 1)  # -128 * 256 - 128 has 17 bits
        if int((products + np.abs(bias)).max(initial=0)) >= EXACT[torch.float64]:
            raise InputError("the weights file has sums over 53 bits, which no project of ours has: export it again")
        self.factor = torch.from_numpy(np.ldexp(1.0, -shift))
        self.bytes = None
        if multiplies_bytes() and matrix.size and matrix.shape[1] < 1 << 16:  # or sums of bytes may be over 31 bits
            self.bytes = _ByBytes(matrix, bits, two)
            bias = bias + self.bytes.offset
        else:
            kind = next(kind for kind, limit in EXACT.items() if int(products.max(initial=0)) < limit)
            self.weight = torch.from_numpy(matrix).to(kind).T  # [n_in, n_out]
        self.bias = torch.from_numpy(bias).double()

    def __call__(self, x: Tensor) -> Tensor:
        """Return the rounded sums float64 [n, n_out] of inputs float64 [n, n_in]."""
        sums = self.bytes(x) if self.bytes is not None else (x.to(self.weight.dtype) @ self.weight).double()
        return rounded(sums.add_(self.bias), self.factor)


class _ByBytes:
    """Sums of products by their bytes. Of two bytes the lower one is less 128: what that leaves out of the sums is 128
    times a sum of the weights' bytes, which is `offset` and for the bias, and 128 times a sum of the inputs."""

    def __init__(self, matrix: np.ndarray, bits: int, two: bool) -> None:
        self.inputs = 1 if bits <= 8 and not two else 2
        self.added = 128 if two else 0  # so that what _bytes leaves out of inputs is what was added
        self.weights = 1 if matrix.min(initial=0) >= -128 and matrix.max(initial=0) <= 127 else 2
        parts = _bytes(torch.from_numpy(matrix.astype(np.int16)).T, self.weights)
        # For each power of 256, highest first: the bytes of inputs that it takes; below one another, their weights; and
        # in which type the sums so far are exact.
        self.powers: list[tuple[list[int], Tensor, torch.dtype]] = []
        bound: Tensor | int = 0
        for power in reversed(range(self.inputs + self.weights - 1)):
            places = [place for place in range(self.inputs) if 0 <= power - place < self.weights]
            weights = torch.cat([parts[power - place] for place in places]).contiguous()
            bound = 256 * bound + 128 * weights.long().abs().sum(dim=0)
            kind = torch.int32 if int(bound.max()) < 1 << 31 else torch.float64
            self.powers.append((places, weights, kind))
        left_out = 128 if self.weights == 2 else 0
        self.offset = (matrix - left_out).sum(axis=1) * (128 if self.inputs == 2 and not two else 0)

    def __call__(self, x: Tensor) -> Tensor:
        parts = _bytes((x + self.added if self.added else x).to(torch.int16), self.inputs)
        total: Tensor | None = None
        for places, weights, kind in self.powers:
            taken = parts[places[0]] if len(places) == 1 else torch.cat([parts[place] for place in places], dim=1)
            sums = torch._int_mm(taken, weights).to(kind)
            total = sums if total is None else sums.add_(total.to(kind), alpha=256)
        assert total is not None
        total = total.double()
        return total.add_(x.sum(dim=1, keepdim=True).mul_(128)) if self.weights == 2 else total
