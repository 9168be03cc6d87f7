"""How pixels enter a network: the one place that says which mean and standard deviation a model has. No torch.

A model's normalisation is resolved when it is built (`resolve`), kept in its run (config.yaml and model.json), and
copied from there into exports; every reader of those files goes through `recorded`.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

from m3vit.errors import InputError, short

WORDS = ("auto", "imagenet")
LIMITS = {"mean": (0.0, 1.0), "std": (1e-3, 1.0)}


class Normalisation(NamedTuple):
    """The network's input is (pixel / 255 - mean) / std, by channel of RGB."""

    mean: tuple[float, float, float]
    std: tuple[float, float, float]

    @property
    def pixel(self) -> tuple[int, int, int]:
        """The pixel (RGB, 0 to 255) that is nearest to zero after normalisation."""
        red, green, blue = (round(255 * value) for value in self.mean)
        return red, green, blue

    def plain(self) -> dict[str, list[float]]:
        """Return it as YAML and JSON hold it: {"mean": [...], "std": [...]}."""
        return {"mean": list(self.mean), "std": list(self.std)}

    def __str__(self) -> str:
        return ", ".join(f"{name} {' '.join(f'{value:g}' for value in getattr(self, name))}" for name in self._fields)


# Of every published M3ViT, InvPT and DeiT configuration.
IMAGENET = Normalisation((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))


def parse(value: Any, where: str) -> Normalisation:
    """Return the normalisation that `where` gives as {"mean": [3 numbers], "std": [3 numbers]}, or raise InputError."""
    if isinstance(value, Mapping) and set(value) == set(LIMITS) and all(map(_valid, value.values(), LIMITS.values())):
        (r, g, b), (r_std, g_std, b_std) = ([float(number) for number in value[name]] for name in LIMITS)
        return Normalisation((r, g, b), (r_std, g_std, b_std))
    limits = " and ".join(f"three numbers of {low:g} to {high:g} for {name}" for name, (low, high) in LIMITS.items())
    raise InputError(
        f"{where} is {short(value)}: give {', '.join(WORDS)} or both of mean and std, {limits}, of images in 0 to 1, "
        "such as {mean: [0.5, 0.5, 0.5], std: [0.5, 0.5, 0.5]}"
    )


def recorded(value: Any, where: str) -> Normalisation:
    """Return the normalisation that a file of ours holds; None, of older ones that had no other, is ImageNet's."""
    return IMAGENET if value is None else parse(value, where)


def check(value: Any) -> None:
    """Raise InputError for a value that model.normalisation cannot have."""
    if value not in WORDS:
        parse(value, "model.normalisation")


def resolve(value: Any, trunk: str, weights: Mapping[str, Any] | None) -> Normalisation:
    """Return what model.normalisation `value` means for a trunk.

    `weights` says of pretrained weights how their images were normalised: "mean" and "std" (timm's pretrained_cfg);
    None for random ones.
    """
    if value == "imagenet" or (value == "auto" and weights is None):
        return IMAGENET
    if value != "auto" or weights is None:
        return parse(value, "model.normalisation")
    given = {name: weights.get(name) for name in LIMITS}
    if None in given.values():
        raise InputError(
            f"model.normalisation auto: the weights of {trunk} do not say how their images were normalised: give "
            "--model.normalisation imagenet, or the mean and std they were trained with"
        )
    return parse(given, f"model.normalisation auto: that of the weights of {trunk}")


def _valid(numbers: Any, limits: tuple[float, float]) -> bool:
    return (
        isinstance(numbers, list | tuple)
        and len(numbers) == 3
        and all(type(one) in (int, float) and limits[0] <= one <= limits[1] for one in numbers)
    )
