"""The emulator's attention: sums of weighted values, one block of keys after the other as the engine takes them.

Shapes: H heads, W channels of a head, N tokens, Q of its queries.
"""

from collections.abc import Callable
from functools import cache
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from m3vit.hw import arithmetic
from m3vit.hw.isa import KEY_BLOCK, MAX_RISE, SCORE_BITS, SCORE_FRAC
from m3vit.hw.sim.linear import EXACT, multiplies_bytes, rounded, to_bytes
from m3vit.hw.sim.threads import each
from m3vit.hw.tables import PROB_FRAC

_UNIT = float(1 << SCORE_FRAC)
_WHOLE_STEPS = (PROB_FRAC + 2) << SCORE_FRAC  # beyond, 2^-x rounds to 0
_QUERIES = 320  # at most, whose scores are taken at once, so that they stay in a cache


class _Weights(NamedTuple):
    """What values are weighted by: at place _WHOLE_STEPS - x of the table, 2^-(x * 2^-SCORE_FRAC) with PROB_FRAC
    fractional bits, down to where it is 0. blocks: so many of keys have weighted sums that are exact in its type."""

    table: Tensor
    blocks: int

    @classmethod
    @cache
    def of(cls, drop: int, bits: int) -> "_Weights":
        """Return the weights, the last `drop` bits of them 0, for values of `bits` bits."""
        table = arithmetic.exp2_neg(np.arange(_WHOLE_STEPS, -1, -1), SCORE_FRAC, PROB_FRAC - drop)
        block = int(table.max()) * KEY_BLOCK << bits - 1  # the largest sum, in units of 2^drop
        kind = torch.float32 if block < EXACT[torch.float32] else torch.float64
        return cls(torch.from_numpy(table << drop).to(kind), EXACT[kind] // block)


class _Scores:
    """The scores of an instruction, in units of 2^-SCORE_FRAC: q [H, W, N] and k [H, N, W], float64, of `bits` bits.

    shift: of a sum of products; hold: what holds scores to SCORE_BITS, if there may be any beyond.
    """

    def __init__(self, q: Tensor, k: Tensor, shift: int, bits: int, hold: Callable[[Tensor], Tensor]) -> None:
        width = k.shape[2]
        # Beyond this no score can be, so none need be looked at.
        highest = float(q.abs().amax() * k.abs().amax()) * width * 2.0**-shift
        self.hold = hold if highest >= 2.0 ** (SCORE_BITS - 1) - 1 else None
        self.shift, self.half = shift, 0.5  # to be added to a score before it is rounded down
        # Products of 16 bits would be of four pairs of bytes, which gains nothing with so few channels.
        self.by_bytes = multiplies_bytes() and bits <= 8 and 0 <= shift < 31 and self.hold is None
        if self.by_bytes:
            self.half = 0.0
            self.queries, self.keys = to_bytes(q), to_bytes(k)
            return
        # All that is computed of scores are multiples of `step`.
        step = min(2.0**-shift, 0.5)
        kind = torch.float32 if (2 * highest + _WHOLE_STEPS + 1) / step < EXACT[torch.float32] else torch.float64
        self.queries, self.keys = (q * 2.0**-shift).to(kind), k.to(kind).contiguous()

    def __call__(self, head: int, which: slice) -> Tensor:
        """Return the scores [N, Q] of some queries, int32 or, to be rounded yet, float; a row for each key."""
        keys, queries = self.keys[head], self.queries[head, :, which]
        if self.by_bytes:
            return torch._int_mm(keys, queries).add_(1 << self.shift >> 1).bitwise_right_shift_(self.shift)
        scores = keys @ queries
        return scores if self.hold is None else self.hold(scores.add_(0.5).floor_())


def attend(
    q: Tensor, k: Tensor, v: Tensor, shift: int, drop: int, bits: int, hold: Callable[[Tensor], Tensor]
) -> Tensor:
    """Return the sums of weighted values and, below them, of weights: float64 [H, W + 1, N].

    q, k, v: float64 [H, W, N], whole numbers of `bits` bits; shift: of a sum of products to a score; drop: bits of a
    weight that are 0; hold: what holds scores to SCORE_BITS.
    """
    heads, _, rows = q.shape
    weights = _Weights.of(drop, bits)
    scores = _Scores(q, k.transpose(1, 2), shift, bits, hold)
    v = torch.cat([v, v.new_ones(heads, 1, rows)], dim=1).to(weights.table.dtype)
    sums = q.new_zeros(v.shape)
    step = -(-rows // -(-rows // _QUERIES))

    def of_head(head: int) -> None:
        for start in range(0, rows, step):
            which = slice(start, start + step)
            _weigh(scores(head, which), scores.half, v[head], weights, sums[head, :, which])

    each(of_head, heads, rows * step)
    return sums


def _weigh(scores: Tensor, half: float, v: Tensor, weights: _Weights, sums: Tensor) -> None:
    """Add the values v [V, N] that scores [N, Q] give weight to sums [V, Q]; half: see _Scores."""
    whole = len(scores) // KEY_BLOCK * KEY_BLOCK
    parts = [scores[:whole].view(-1, KEY_BLOCK, scores.shape[1]), scores[None, whole:]]  # blocks, and what is left
    parts = [part for part in parts if part.numel()]
    # The largest rounded score is the largest score, rounded.
    highest = torch.cat([part.amax(dim=1) for part in parts]).double().add_(half).floor_()
    tops = highest.div_(_UNIT).ceil_().cummax(dim=0).values
    zeros = (tops * _UNIT - (_WHOLE_STEPS + half)).to(scores.dtype)[:, None]  # the scores whose weight is at place 0
    for part, zero in zip(parts, zeros.split([len(part) for part in parts]), strict=True):
        part.sub_(zero)
    # Truncation of a positive number rounds down: so this rounds the scores half up.
    places = scores.clamp_(min=0).to(torch.int32)
    weighted = weights.table.index_select(0, places.view(-1)).view(places.shape)
    risen = tops[1:] > tops[:-1]
    # Blocks of keys are taken together while no maximum rises: rounding leaves whole numbers alone there.
    start = 0
    for end in [*(risen.any(dim=1).nonzero()[:, 0] + 1).tolist(), len(tops)]:
        for at in range(start, end, weights.blocks):
            keys = slice(at * KEY_BLOCK, min(end, at + weights.blocks) * KEY_BLOCK)
            sums += v[:, keys] @ weighted[keys]
        if end < len(tops):
            queries = risen[end - 1].nonzero()[:, 0]
            fall = torch.exp2((tops[end - 1] - tops[end])[queries].clamp_(min=-MAX_RISE))
            sums[:, queries] = rounded(sums[:, queries], fall)
        start = end
