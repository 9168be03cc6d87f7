"""Random programs for the engines, and the test bench built for them."""

import json
import subprocess
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from m3vit.export.hls.multiplexed.scheduler import Scheduler
from m3vit.export.hls.multiplexed.sources import HEADER_TEXT, PORTS, parameters_text, top_text
from m3vit.hw.hardware import PORT_BITS, Hardware
from m3vit.hw.layer_bits import OF_BLOCK
from m3vit.hw.program import Image
from m3vit.hw.sim import csim

ROOT = Path(__file__).resolve().parents[2]
INCLUDE = ROOT / "hw" / "include"
STRICT = ["-std=c++11", "-Wall", "-Wextra", "-Werror", "-Wno-unknown-pragmas", "-Wno-unused-label"]
SANITIZERS = ["-O0", "-g", "-fsanitize=address,undefined", "-fno-sanitize-recover=all"]

# One configuration serves every random model: sizes are run-time values up to these.
HARDWARE = Hardware(
    16,
    16,
    16,
    max_in=144,
    max_dim=160,
    max_rows=200,
    max_experts=256,
    max_top=8,
    max_head=32,
    token_block=32,
    groups=32,
    norm_words=2,
    pixels=1,
)
FORMATS = {"w16a16": (16, 16), "w8a8": (8, 8), "w12a14": (12, 14)}
# Arrays from one that takes keys and heads in several passes to one with several queries at once; lanes of softmax from
# those of some keys of a query to all of two queries, of which a group has three.
ARRAYS = {"w16a16": 16, "w8a8": 144, "w12a14": 96}
REST = {
    "w16a16": {},
    "w8a8": {"pixels": 4, "divided": 16, "results": 16, "lanes": 64, "max_bytes": 288},
    "w12a14": {"pixels": 2, "norm_words": 1, "divided": 4, "lanes": 128},
}
# Ports of 256 bits, as HBM has, wide values of 16, and heads as wide as a block of keys; a group has three queries.
WIDE = replace(
    HARDWARE,
    weight_bits=8,
    act_bits=8,
    tile_out=256,
    folded=True,
    tile_in=32,
    port_bits=256,
    wide_bits=16,
    weight_ports=2,
    max_in=288,
    max_head=64,
    lanes=128,
    results=32,
    divided=16,
    pixels=4,
    max_bytes=576,
)


def hardware_of(name: str) -> Hardware:
    """Return the configuration that the random models of a format run on."""
    weight_bits, act_bits = FORMATS[name]
    sizes = {"tile_out": ARRAYS[name], "weight_ports": 2 if name == "w8a8" else 1}
    return replace(HARDWARE, weight_bits=weight_bits, act_bits=act_bits, **sizes, **REST[name])


FOLDED = replace(hardware_of("w8a8"), tile_out=128, folded=True, wide_bits=16)


@dataclass
class Shape:
    """Sizes of a random ViT; blocks with odd numbers have experts."""

    grid: tuple[int, int] = (3, 5)
    patch: int = 4
    prefix: int = 1
    dim: int = 24
    depth: int = 2
    heads: int = 3
    mlp: int = 40
    experts: int = 5
    top_k: int = 2
    hidden: int = 20
    tasks: int = 3
    act_bits: int = 16
    weight_bits: int = 16
    finer: int = 0  # narrow fractions this much finer than fits: values saturate
    wide_frac: int = 16
    wide_bits: int = 32
    upscale: int = 0  # pixels of a token and side for heads with a convolution; 0: linear heads
    unrectified: int = 0  # features that pass by the ReLU of such heads, of 5
    fine: frozenset[str] = frozenset()  # maps whose inputs have two bytes: m3vit.hw.layer_bits


def random_vit(shape: Shape, seed: int = 0, port_bits: int = PORT_BITS) -> tuple[Image, dict[str, int]]:
    """Return the image of a ViT with random weights, and the sizes that its hardware needs."""
    rng = np.random.default_rng(seed)

    def draw(*size: int, std: float | None = None) -> np.ndarray:
        return rng.normal(0, std or size[-1] ** -0.5, size)

    s, dim = shape, shape.dim
    scheduler = Scheduler(s.tasks, s.weight_bits, s.act_bits, s.wide_frac, port_bits, s.wide_bits)
    frac = s.act_bits - 5 + s.finer

    def reads(name: str) -> tuple[int, bool]:
        """Return the fraction of a map's inputs, and whether they have two bytes."""
        return (frac + 8, True) if name in s.fine else (frac, False)

    x = scheduler.image(s.grid, s.patch)
    x = scheduler.embed("embed", x, draw(dim, x.columns, std=2 * x.columns**-0.5), draw(dim, std=0.2), s.prefix)
    x = scheduler.position("position", x, draw(x.rows, dim, std=0.3), s.prefix)
    for block in range(s.depth):
        (of_qkv, qkv), (of_proj, proj), (of_fc1, fc1), (of_fc2, fc2) = (
            reads(f"blocks.{block}.{name}") for name in OF_BLOCK
        )
        y = scheduler.norm(f"norm1_{block}", x, 1 + draw(dim, std=0.1), draw(dim, std=0.1), 1e-6, of_qkv, fine=qkv)
        fracs = np.array([frac, frac - 1, frac])
        y = scheduler.qkv(f"qkv_{block}", y, draw(3 * dim, dim), draw(3 * dim, std=0.1), fracs, s.heads)
        y = scheduler.attention(f"attention_{block}", y, s.heads, of_proj + 1, proj)
        stream = s.wide_frac - (block + 1) * (s.wide_bits == 16)  # such a stream loses a bit at each attention
        x = scheduler.linear_added(f"proj_{block}", y, draw(dim, dim), draw(dim, std=0.1), x, frac=stream)
        y = scheduler.norm(f"norm2_{block}", x, 1 + draw(dim, std=0.1), draw(dim, std=0.1), 1e-6, of_fc1, fine=fc1)
        if block % 2:
            weights = {
                "router_w": draw(s.tasks, s.experts, dim, std=2 * dim**-0.5),
                "router_b": draw(s.tasks, s.experts, std=0.1),
                "w1": draw(s.experts, s.hidden, dim),
                "b1": draw(s.experts, s.hidden, std=0.1),
                "w2": draw(s.experts, dim, s.hidden),
                "b2": draw(s.experts, dim, std=0.1),
            }
            logits, hidden = 20 if s.wide_bits == 32 else 10, (of_fc2, of_fc2)
            x = scheduler.moe_added(f"moe_{block}", y, weights, s.top_k, logits, hidden, x, fine=fc2)
        else:
            hidden = (of_fc2, of_fc2)
            y = scheduler.linear(f"fc1_{block}", y, draw(s.mlp, dim), draw(s.mlp, std=0.1), 0, hidden, fine=fc2)
            x = scheduler.linear_added(f"fc2_{block}", y, draw(dim, s.mlp), draw(dim, std=0.1), x)
    (of_head, head), (of_conv, conv) = reads("heads.linear"), reads("heads.conv")
    y = scheduler.norm("head.norm", x, np.ones(dim), np.zeros(dim), 1e-6, of_head, skip=s.prefix, fine=head)
    widths = [3 + 4 * task for task in range(s.tasks)]
    fracs = [16] * s.tasks
    if s.upscale:
        feature_maps = [(draw(s.upscale**2 * 5, dim), draw(s.upscale**2 * 5, std=0.1)) for _ in widths]
        kernels = [(draw(width, 9 * 5), draw(width, std=0.1)) for width in widths]
        pixels = {"columns": s.grid[1], "upscale": s.upscale, "unrectified": s.unrectified}
        features = (feature_maps, [of_conv] * s.tasks)
        scheduler.pixel_head("head", y, features, (kernels, fracs), **pixels, fine=conv)
    else:
        maps = [(draw(width, dim), draw(width, std=0.1)) for width in widths]
        scheduler.head("head", y, maps, fracs)
    return scheduler.build(), scheduler.limits


def frames_of(shape: Shape, count: int, seed: int = 0) -> np.ndarray:
    """Return random frames uint8 [count, H, W, 3]."""
    height, width = (side * shape.patch for side in shape.grid)
    return np.random.default_rng(seed).integers(0, 256, (count, height, width, 3), dtype=np.uint8)


@dataclass
class Simulator:
    """A test bench, and what one run of it returned."""

    binary: Path

    @classmethod
    def build(
        cls, folder: Path, hardware: Hardware, flags: list[str], edit: Callable[[str], str] = lambda text: text
    ) -> "Simulator":
        """Compile the engines for a hardware configuration; `edit` changes the text of their headers."""
        firmware = folder / "firmware"
        firmware.mkdir(parents=True)
        (firmware / "nnet_utils").mkdir()
        for header in [*INCLUDE.glob("m3vit_tables.h"), INCLUDE / "m3vit_integer.h", *INCLUDE.glob("engine/*.h")]:
            (firmware / "nnet_utils" / header.name).write_text(edit(header.read_text()))
        (firmware / "parameters.h").write_text(parameters_text(hardware))
        (firmware / "m3vit.h").write_text(HEADER_TEXT)
        (firmware / "m3vit.cpp").write_text(top_text(dict.fromkeys(PORTS, 1), hardware.port_bits))
        (folder / "m3vit_host.h").symlink_to(ROOT / "hw" / "project" / "m3vit_host.h")
        sources = [str(ROOT / "hw" / "project" / "m3vit_test.cpp"), str(firmware / "m3vit.cpp")]
        binary = folder / "csim.exe"
        command = [csim.find_compiler(), *STRICT, *flags, f"-I{folder}", *sources, "-o", str(binary)]
        subprocess.run(command, check=True)
        return cls(binary)

    def run(
        self, folder: Path, image: Image, frames: np.ndarray, tasks: list[int], start: Sequence[np.ndarray] = ()
    ) -> tuple[np.ndarray, list[dict[str, Any]], np.ndarray]:
        """Return outputs int32 [n, words], counters (one for each frame and instruction) and routing uint16 words.

        start: the narrow and wide memory before each frame. What they hold after it is in memories.bin of the folder.
        """
        folder.mkdir(exist_ok=True)
        image.write(folder / "weights.bin")
        frames.tofile(folder / "images.bin")
        np.array(tasks, np.uint8).tofile(folder / "tasks.bin")
        names = ["weights.bin", "images.bin", "tasks.bin", "outputs.bin", "counters.json", "routing.bin"]
        names.append("memories.bin")
        if start:
            (folder / "start.bin").write_bytes(b"".join(words.tobytes() for words in start))
            names.append("start.bin")
        done = subprocess.run([str(self.binary), *names], cwd=folder, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr[:2000]
        outputs = np.fromfile(folder / "outputs.bin", np.int32).reshape(len(tasks), -1)
        counters = [json.loads(line) for line in (folder / "counters.json").read_text().splitlines()]
        return outputs, counters, np.fromfile(folder / "routing.bin", np.uint16)


Builds = dict[str, list[Simulator]]
