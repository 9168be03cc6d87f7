"""What the values of tensors reach: the largest magnitudes and, where a bit is dear, how many come near them."""

import numpy as np
import torch
from torch import Tensor

OCTAVES = 64  # that magnitudes are counted in: those of 2^-32 to 2^32


def largest(value: Tensor) -> float:
    """Return the largest magnitude in a tensor that is not empty."""
    low, high = value.aminmax()
    return max(-float(low), float(high))


def octave_sums(value: Tensor, reached: float) -> Tensor:
    """Return how many magnitudes |v| a tensor has in each octave, 2^(k-1) <= |v| < 2^k, and the sums of |v| and v^2:
    float64 [3, OCTAVES], k = place - OCTAVES / 2.

    `reached`: the largest magnitude of this and of like tensors before it. Those below half of it, which no sensible
    fraction clips, count to the first octave and are not summed.
    """
    found = torch.zeros(3, OCTAVES, dtype=torch.float64)
    found[0, 0] = value.numel()
    if not reached:
        return found
    magnitude = np.abs(value.detach().numpy()).ravel()  # numpy picks in half of torch's time
    exact = torch.from_numpy(magnitude[magnitude >= reached / 2]).double()
    octave = torch.frexp(exact).exponent.long().add_(OCTAVES // 2).clamp_(1, OCTAVES - 1)
    for row, weights in enumerate((torch.ones_like(exact), exact, exact * exact)):
        found[row] += torch.bincount(octave, weights, OCTAVES)
    found[0, 0] -= len(exact)
    return found


class Magnitudes(dict[str, float]):
    """The largest magnitude of each tensor noted, by name; octaves: their `octave_sums`, if they were asked for."""

    def __init__(self, with_octaves: bool = False) -> None:
        super().__init__()
        self.with_octaves = with_octaves
        self.octaves: dict[str, Tensor] = {}

    def note(self, name: str, value: Tensor, wide: bool = False) -> None:
        """Take the values of a tensor that is not empty in; wide: it has bits to spare, and needs no octaves."""
        reached = max(largest(value), self.get(name, 0.0))
        self._take(name, reached, octave_sums(value, reached) if self.with_octaves and not wide else None)

    def take(self, other: "Magnitudes") -> None:
        """Take what another one has noted in."""
        for name, reached in other.items():
            self._take(name, reached, other.octaves.get(name))

    def _take(self, name: str, reached: float, sums: Tensor | None) -> None:
        self[name] = max(self.get(name, 0.0), reached)
        if sums is not None:
            self.octaves[name] = self.octaves.get(name, 0) + sums
