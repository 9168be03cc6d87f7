"""Which linear maps take inputs of 16 bits on an array for 8: the text of --layer-bits, and the names in it. No torch.

A map is called as in the model: blocks.3.attn.qkv, .attn.proj, .mlp.fc1, .mlp.fc2 (of experts both maps of all of them,
and with fc1 the router, which reads the same), heads.linear, heads.conv. A name may end early, and takes all that
begins with it; the number of a block may be *.
"""

from collections.abc import Collection, Iterable
from dataclasses import dataclass

from m3vit.errors import InputError

BITS = (8, 16)  # of a map's inputs
OF_BLOCK = ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2")


@dataclass(frozen=True)
class LayerBits:
    """What is asked for: names and bits, in the order given; and what messages call it."""

    entries: tuple[tuple[str, int], ...] = ()
    said: str = "--layer-bits"

    def __bool__(self) -> bool:
        return bool(self.entries)


def parse_layer_bits(text: str, said: str = "--layer-bits") -> LayerBits:
    """Return the entries of "blocks.10.mlp=16,heads=16"; `said`: what the text is called.

    Raises InputError for another form or other bits.
    """
    entries = []
    for part in text.split(","):
        name, equals, bits = (piece.strip() for piece in part.partition("="))
        if not name or not equals or bits not in map(str, BITS):
            raise InputError(
                f"{said} {text!r}: {part.strip()!r} is not NAME=BITS with {' or '.join(map(str, BITS))} bits: give "
                "such as blocks.10.mlp=16,heads=16"
            )
        entries.append((name, int(bits)))
    return LayerBits(tuple(entries), said)


def names_of_maps(blocks: Iterable[int | str], conv: bool) -> list[str]:
    """Return the names of a model's maps that may have inputs of 16 bits. blocks: their numbers; conv: heads have
    convolutions."""
    return [
        *(f"blocks.{block}.{name}" for block in blocks for name in OF_BLOCK),
        "heads.linear",
        *(["heads.conv"] if conv else []),
    ]


def _takes(wanted: str, name: str) -> bool:
    """Return whether a name of an entry takes a map."""
    parts, own = wanted.split("."), name.split(".")
    return len(parts) <= len(own) and all(
        one == other or (one == "*" and place == 1 and own[0] == "blocks")
        for place, (one, other) in enumerate(zip(parts, own, strict=False))
    )


def chosen_maps(layers: LayerBits, names: Collection[str]) -> frozenset[str]:
    """Return the maps whose inputs have 16 bits: of several entries that take a map the last one counts.

    Raises InputError for an entry that takes none, or changes nothing.
    """
    entries, said = layers.entries, layers.said
    bits = dict.fromkeys(names, BITS[0])
    for wanted, count in entries:
        taken = [name for name in names if _takes(wanted, name)]
        if not taken:
            blocks = list(dict.fromkeys(name.split(".")[1] for name in names if name.startswith("blocks.")))
            heads = [name for name in names if name.startswith("heads")]
            known = [f"blocks.N.{name}" for name in OF_BLOCK]
            raise InputError(
                f"{said} {wanted}={count}: this model has no {wanted}: give {', '.join([*known, *heads])}, or "
                f"what such a name begins with; N is {', '.join(blocks)} or *"
            )
        if all(bits[name] == count for name in taken):
            raise InputError(
                f"{said} {wanted}={count}: the inputs of {wanted} have {count} bits without it: leave it out"
            )
        bits |= dict.fromkeys(taken, count)
    if entries and BITS[1] not in bits.values():
        raise InputError(f"{said}: no layer is left with 16 bits: leave it out, or give one 16")
    for place, (wanted, count) in enumerate(entries):
        without: dict[str, int] = dict.fromkeys(names, BITS[0])
        for other, of_other in [*entries[:place], *entries[place + 1 :]]:
            without |= {name: of_other for name in names if _takes(other, name)}
        if without == bits:
            raise InputError(f"{said} {wanted}={count}: the others choose the same maps without it: leave it out")
    return frozenset(name for name, count in bits.items() if count == BITS[1])
