"""What the values of tensors reach: the largest magnitudes and, where a bit is dear, how many come near them."""

import torch
from torch import Tensor

OCTAVES = 64  # that magnitudes are counted in: those of 2^-32 to 2^32


def largest(value: Tensor) -> float:
    """Return the largest magnitude in a tensor that is not empty."""
    low, high = value.aminmax()
    return max(-float(low), float(high))


def octave_sums(value: Tensor) -> Tensor:
    """Return how many magnitudes |v| a tensor has in each octave, 2^(k-1) <= |v| < 2^k, and the sums of |v| and v^2:
    float64 [3, OCTAVES], k = place - OCTAVES / 2.

    Those below half of the largest, which no sensible fraction clips, count to the first octave and are not summed.
    """
    magnitude = value.detach().abs().flatten()
    large = magnitude[(magnitude >= magnitude.max() / 2) & (magnitude > 0)]
    octave = torch.frexp(large).exponent.long().add_(OCTAVES // 2).clamp_(1, OCTAVES - 1)
    exact = large.double()
    sums = [torch.bincount(octave, weights, OCTAVES) for weights in (torch.ones_like(exact), exact, exact * exact)]
    found = torch.stack(sums)
    found[0, 0] = len(magnitude) - len(large)
    return found


class Magnitudes(dict[str, float]):
    """The largest magnitude of each tensor noted, by name; octaves: their `octave_sums`, if they were asked for."""

    def __init__(self, with_octaves: bool = False) -> None:
        super().__init__()
        self.with_octaves = with_octaves
        self.octaves: dict[str, Tensor] = {}

    def note(self, name: str, value: Tensor) -> None:
        """Take the values of a tensor that is not empty in."""
        self._take(name, largest(value), octave_sums(value) if self.with_octaves else None)

    def take(self, other: "Magnitudes") -> None:
        """Take what another one has noted in."""
        for name, reached in other.items():
            self._take(name, reached, other.octaves.get(name))

    def _take(self, name: str, reached: float, sums: Tensor | None) -> None:
        self[name] = max(self.get(name, 0.0), reached)
        if sums is not None:
            self.octaves[name] = self.octaves.get(name, 0) + sums
