"""Two published accelerators of M3ViT by closed forms, from what their papers and sources say. No torch.

M3ViT's own table of a ZCU104 (arXiv 2210.14793, table 4) is an estimate of its authors, not a measurement (Edge-MoE
says so; its energies are its latencies times 10 W). Five numbers explain its rows: 12-bit weights, 64 bytes a cycle
from memory and two cycles more for each expert that is fetched, 1536 multiply-accumulates a cycle, 5 cycles of a
router a token. The paper states none of them: they were found from the table. So what follows reproduces the paper's
model and says nothing about hardware.

Edge-MoE (arXiv 2305.18691) was measured on a ZCU102. Its trip counts, initiation intervals and overlaps are read from
its public source (sharc-lab/Edge-MoE), the width of its ports from its block design; the latencies were set before the
first comparison. Nothing was fitted to its time.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from math import ceil

MIB = 1 << 20


@dataclass(frozen=True)
class Table4:
    """M3ViT's model of a ViT-small of which every second block has experts, 4 of 16 a token."""

    dim: int = 384
    mlp: int = 1536  # hidden channels of a dense block; top_k experts of `hidden` are as many
    hidden: int = 384
    layers: int = 12
    moe_layers: int = 6
    experts: int = 16
    top_k: int = 4
    patch_values: int = 768
    clock_hz: float = 300e6
    weight_bits: int = 12
    bytes_a_cycle: int = 64
    fetch_cycles: int = 2  # of an expert, beside its bytes
    macs_a_cycle: int = 1536
    router_cycles: int = 5  # of a token and layer

    @property
    def expert_bytes(self) -> float:
        """Bytes of an expert's two maps and their biases."""
        return (2 * self.dim * self.hidden + self.hidden + self.dim) * self.weight_bits / 8

    @property
    def experts_mib(self) -> float:
        """All experts of a layer, which is what a chip holds that does not reorder."""
        return self.experts * self.expert_bytes / MIB

    def dense_ms(self, tokens: int) -> float:
        """Milliseconds of the dense network; that of the experts has as many products."""
        block = 4 * tokens * self.dim**2 + 2 * tokens**2 * self.dim + 2 * tokens * self.dim * self.mlp
        macs = self.layers * block + (tokens - 1) * self.dim * self.patch_values
        return self._ms(macs / self.macs_a_cycle)

    def reordered_ms(self, tokens: int) -> float:
        """Milliseconds with experts one after the other, each fetched while another is worked on."""
        return self.dense_ms(tokens) + self._ms(self.router_cycles * tokens * self.moe_layers)

    def penalty_ms(self, tokens: int) -> float:
        """Milliseconds of fetching every expert of every token anew: a cache that never has it."""
        fetches = tokens * self.top_k * self.moe_layers
        return self._ms(fetches * (self.expert_bytes / self.bytes_a_cycle + self.fetch_cycles))

    def _ms(self, cycles: float) -> float:
        return cycles / self.clock_hz * 1e3


# The rows that table 4 prints of the FPGA, ms and MiB: tokens of 512 x 512 and 480 x 640 pixels in patches of 16, and
# the class token.
TOKENS = {"PASCAL": 32 * 32 + 1, "NYUD": 30 * 40 + 1}
TABLE4_MS = {
    "dense": {"PASCAL": 68.931, "NYUD": 84.418},
    "experts, reordered": {"PASCAL": 69.033, "NYUD": 84.538},
    "experts, not reordered": {"PASCAL": 637.478, "NYUD": 750.557},
}
TABLE4_MIB = {"reordered": 4.840, "all experts": 11.610}

EDGE_MOE_MS = 34.64  # measured by its authors, ZCU102
# Tokens of each expert in the first layer with experts, which its repository ships for two tasks. Weights of the later
# layers are not public, so all six are taken to be alike; or every expert has tokens, which is the most.
EDGE_MOE_QUEUES = {
    "task 0": (0, 6, 0, 32, 0, 27, 15, 24, 22, 19, 0, 22, 11, 33, 32, 15),
    "task 1": (0, 17, 0, 41, 1, 22, 16, 25, 2, 19, 0, 23, 16, 1, 51, 24),
    "all experts alike": (16,) * 14 + (17,) * 2,
}


# HG-PIPE (ICCAD 2024, hguq/HG-PIPE): trips of each block's longest loop in its C++, II 1, and the cycles between frames
# of the Verilog that Vitis HLS 2023.2 made of it, under Verilator (benchmarks/hls_truth.py).
HG_PIPE = {
    "HEAD": (250 * 192, 48_001),
    "PATCH_EMBED": (98 * 12 * 48, 56_449),
    "MLP0": (98 * 3 * 192, 56_449),
    "ATTN0": (98 * 3 * 196, 57_625),
}


@dataclass(frozen=True)
class EdgeMoe:
    """Edge-MoE's structure: cycles of its kernels, one after the other.

    block: channels of a word of 256 bits; tile: of inputs and outputs of the linear kernel; queries: that attention
    takes at once. beat: cycles of a 256-bit word on a 128-bit port of the processing system (bitstream.hwh). fill: of a
    kernel's pipeline; read: from a request to its first word (68.5 measured on a ZCU102,
    kmanev/ZynqUSp-AXI-Speedtest#1); norm: of LayerNorm's pipeline.
    """

    tokens: int = 129
    dim: int = 192
    mlp: int = 768
    hidden: int = 384
    layers: int = 12
    moe_layers: int = 6
    experts: int = 16
    patches: int = 128
    block: int = 8
    tile: int = 16
    queries: int = 4
    clock_hz: float = 299.970032e6
    beat: int = 2
    fill: int = 150
    read: int = 70
    norm: int = 120

    def linear(self, outputs: int, inputs: int, tokens: int) -> int:
        """Cycles of compute_linear: reading, multiplying and writing side by side, the slowest decides."""
        products = tokens * ceil(outputs / self.tile) * ceil(inputs / self.tile)
        read, written = (self.beat * tokens * ceil(count / self.block) for count in (inputs, outputs))
        return max(products, read, written) + self.fill

    def load(self, outputs: int, inputs: int) -> int:
        """Cycles of load_linear_weights: weights and biases of 16 bits, 16 a word."""
        return self.beat * (ceil(outputs * inputs / 16) + ceil(outputs / 16)) + 2 * self.read

    def cycles(self, queues: Sequence[int]) -> dict[str, int]:
        """Return the cycles of a frame by kernel; queues: tokens of each expert, in every layer with experts."""
        tokens, dim, words = self.tokens, self.dim, self.dim // self.block
        dense = self.layers - self.moe_layers
        # Keys, and then values, pass once for each `queries` queries.
        passes = ceil((tokens + self.queries - 1) / self.queries) * tokens * words * max(1, self.beat)
        up, down = (self.mlp, dim), (dim, self.mlp)
        # A router's token: 24 words, products 10, softmax 48, top-k 30 and 16, quotients 5, 60 of latency.
        router = tokens * (words + 10 + 48 + 30 + 16 + 5 + 60) + self.beat * self.experts * dim // 16 + tokens * words
        norm = tokens * max(self.beat * words + self.read, words + self.norm)
        return {
            "queries x keys": self.layers * (passes + self.fill),
            "weights x values": self.layers * (passes + self.fill),
            "attention's linear maps": self.layers * 4 * (self.load(dim, dim) + self.linear(dim, dim, tokens)),
            "dense MLPs": dense * sum(self.load(*size) + self.linear(*size, tokens) for size in (up, down)),
            "experts": self.moe_layers * self._experts([count for count in queues if count]),
            "routers": self.moe_layers * router,
            "LayerNorm": self.layers * (2 * norm + 4 * (self.beat * words // 2 + self.read)),
            "residual additions": self.layers * 2 * (self.beat * tokens * words + self.read),
            # 8 times 3 x 16 lines of 8 pixels, 24 words of results each.
            "patches": 8 * 3 * 16 * 8 * words + 16 * words * self.beat + words,
        }

    def _experts(self, queue: Sequence[int]) -> int:
        """Cycles of compute_moe: the next map's weights are loaded while this one is computed."""
        up, down = (self.hidden, self.dim), (self.dim, self.hidden)
        total = self.load(*up)
        for place, tokens in enumerate(queue):
            following = self.load(*up) if place + 1 < len(queue) else 0
            total += max(self.linear(*up, tokens), self.load(*down)) + max(self.linear(*down, tokens), following)
        return total

    def ms(self, queues: Sequence[int]) -> float:
        """Milliseconds of a frame."""
        return sum(self.cycles(queues).values()) / self.clock_hz * 1e3
