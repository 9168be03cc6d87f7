"""Host driver of the accelerator for PYNQ (Python 3.10 or newer, numpy): weights, task, budget, run, predictions.

    from pynq import Overlay, allocate
    from m3vit_driver import Accelerator

    overlay = Overlay("m3vit.bit")
    accelerator = Accelerator(overlay.m3vit_0, allocate, "..")  # .. is the project's folder
    accelerator.set_task("depth")
    depth_m = accelerator.predict(image)                        # image: uint8 [H, W, 3], RGB
    accelerator.set_budget("light")                             # of a project with several

It has run against a software model of the registers and the memory (tests/export/multiplexed/test_driver.py of m3vit),
never on a board. Registers are taken by name from the overlay's description: it does not depend on the addresses that
Vitis HLS gives them.
"""

import hashlib
import json
import time
from pathlib import Path
from typing import Any

import numpy as np
from m3vit_decoding import assemble, decode
from m3vit_output_memory import OutputLayout
from m3vit_weights_file import Header

WEIGHTS = "firmware/weights/weights.bin"
START, DONE = 1, 2  # bits of the control register (ap_ctrl_hs); reading clears DONE
# Pointer arguments of the accelerator: which buffer each gets.
POINTERS = {
    "image": "image",
    "weights": "weights",
    "more_weights": "weights",
    "gates": "gates",
    "params": "params",
    "keys": "narrow",
    "narrow_in": "narrow",
    "narrow_out": "narrow",
    "wide_in": "wide",
    "wide": "wide",
    "more_wide_in": "wide",
    "more_wide": "wide",
    "output": "output",
}


def read_manifest(project: Path) -> dict[str, Any]:
    """Return a project's m3vit.json, or raise ValueError if it is not as it was exported.

    Its last key, sha256, is the digest of the others, written without spaces.
    """
    path = project / "m3vit.json"
    manifest = json.loads(path.read_text())
    digest = manifest.pop("sha256", None)
    if digest != hashlib.sha256(json.dumps(manifest, separators=(",", ":")).encode()).hexdigest():
        raise ValueError(f"{path} was changed since export (its sha256 differs): copy the project again")
    return dict(manifest)


class Accelerator:
    """One accelerator and its buffers in DDR."""

    def __init__(self, ip: Any, allocate: Any, project: str | Path, timeout_s: float = 10.0) -> None:
        """Load the weights of a project's folder; raises ValueError if they or m3vit.json were changed since export.

        ip: PYNQ's handle (read, write, description["registers"]); allocate: pynq.allocate.
        """
        self.ip, self.allocate, self.timeout_s = ip, allocate, timeout_s
        project = Path(project)
        self.manifest = read_manifest(project)
        weights = project / WEIGHTS
        if self.manifest["files"].get(WEIGHTS) != hashlib.sha256(weights.read_bytes()).hexdigest():
            raise ValueError(f"{weights} was changed since export (its sha256 differs): copy the project again")
        self.tasks = [task["name"] for task in self.manifest["tasks"]]
        self.layout = OutputLayout.of(self.manifest)
        self.budgets = [budget["name"] for budget in self.manifest.get("budgets", [])]
        self.registers = {name: entry["address_offset"] for name, entry in ip.description["registers"].items()}
        self.buffers: dict[str, Any] = {}
        self.load_weights(weights)
        self.set_task(0)

    def load_weights(self, path: str | Path) -> None:
        """Copy a weights file into DDR, and allocate the memories that its programs need; the first budget is chosen.

        The file may be another one than the accelerator was built with, if its sizes fit the hardware.
        """
        header = Header.read(path)
        if header is None:
            raise ValueError(f"{path} is not a weights file of m3vit: give firmware/weights/weights.bin")
        hardware = self.manifest["hardware"]
        stored = 8 if hardware["weight_bits"] <= 8 else 16
        if header.weight_bits != stored or header.act_bits != hardware["act_bits"]:
            raise ValueError(
                f"{path} is for {header.weight_bits}-bit words and {header.act_bits}-bit activations, the accelerator "
                f"for {stored} and {hardware['act_bits']}: export with the same --weight-bits and --act-bits"
            )
        wide_bits = hardware.get("wide_bits", 32)
        if (header.wide_bits or 32) != wide_bits:
            raise ValueError(
                f"{path} is for a residual stream of {header.wide_bits or 32} bits, the accelerator for {wide_bits}: "
                "export with the same --residual-bits"
            )
        if header.two_bytes and not hardware.get("max_bytes"):
            raise ValueError(
                f"{path} has layers with inputs of 16 bits, the accelerator 8 alone: export with the same --layer-bits"
            )
        outputs = self.manifest["tokens"] * self.layout.token_pitch
        if header.output != outputs:
            raise ValueError(
                f"{path} is for an output memory of {header.output} values, the accelerator for {outputs}: export it "
                "with the same tasks, board and version of m3vit"
            )
        for name, (offset, count, kind) in header.sections().items():
            buffer = self._buffer(name, max(count, 1), kind)
            buffer[:count] = np.fromfile(path, kind, count, offset=offset)
            buffer.flush()
        act = np.int8 if header.act_bits <= 8 else np.int16
        for name, size, element in (
            ("narrow", header.narrow, act),
            ("wide", header.wide, np.int16 if header.wide_bits else np.int32),
            ("output", header.output, np.int32),
            ("image", header.image, np.uint8),
        ):
            self._buffer(name, size, element)
        for argument, buffer_name in POINTERS.items():
            address = int(self.buffers[buffer_name].device_address)
            self.ip.write(self._register(argument, 1), address & 0xFFFFFFFF)
            self.ip.write(self._register(argument, 2), address >> 32)
        self.ip.write(self._register("num_tasks"), header.tasks)
        starts = self.buffers["params"][header.programs_at : header.programs_at + header.programs]
        self.entries = [int(start) for start in starts] or [0]
        self.set_budget(0)

    def set_task(self, task: str | int) -> None:
        """Choose what the next run computes; nothing is loaded again."""
        if task not in self.tasks and task not in range(len(self.tasks)):
            raise ValueError(f"no task {task!r}: this accelerator has {', '.join(self.tasks)}")
        self.task = self.tasks.index(task) if isinstance(task, str) else int(task)
        self.ip.write(self._register("task"), self.task)

    def set_budget(self, budget: str | int) -> None:
        """Choose how much of the model the next run uses, by name or number; nothing is loaded again."""
        names = self.budgets or [""]
        number = names.index(budget) if budget in names else budget
        if number not in range(len(self.entries)):
            have = ", ".join(self.budgets) or "one"
            raise ValueError(f"no budget {budget!r}: this accelerator has {have}")
        self.budget = int(number)
        self.ip.write(self._register("entry"), self.entries[self.budget])

    def run(self, image: np.ndarray) -> np.ndarray:
        """Run one frame uint8 [H, W, 3] and return its token outputs float32 [T, C of the task]."""
        height, width = self.manifest["image_size"]
        if image.dtype != np.uint8 or image.shape != (height, width, 3):
            raise ValueError(f"image is {image.dtype} {image.shape}: give uint8 [{height}, {width}, 3], RGB")
        self.buffers["image"][:] = image.ravel()
        self.buffers["image"].flush()
        self.ip.write(self.registers["CTRL"], START)
        limit = time.monotonic() + self.timeout_s
        while not self.ip.read(self.registers["CTRL"]) & DONE:
            if time.monotonic() > limit:
                raise TimeoutError(f"the accelerator did not finish within {self.timeout_s} s")
        self.buffers["output"].invalidate()
        words = np.array(self.buffers["output"]).reshape(self.manifest["tokens"], self.layout.token_pitch)
        used = self.layout.outputs(words, self.task)
        return np.ldexp(used.astype(np.float64), -self.manifest["output_fracs"][self.task]).astype(np.float32)

    def predict(self, image: np.ndarray) -> np.ndarray:
        """Run one frame and return the task's prediction at the image's size, as m3vit.export.runtime.package does.

        semseg: class ids uint8 [H, W]; depth: metres [H, W]; normals: unit vectors [H, W, 3]; edge: probability [H, W].
        """
        rows, columns = self.manifest["grid"]
        height, width = self.manifest["image_size"]
        form = {"upscale": self.manifest["upscale"], "pixels_first": self.manifest.get("pixels_first", False)}
        logits = assemble(self.run(image), (rows, columns), size=(height, width), **form)
        return decode(logits[None], self.manifest["tasks"][self.task]["decode"])[0]

    def _buffer(self, name: str, size: int, kind: Any) -> Any:
        """Allocate a buffer, unless there is one of this size already."""
        if name not in self.buffers or self.buffers[name].size != size or self.buffers[name].dtype != kind:
            self.buffers[name] = self.allocate(shape=(size,), dtype=kind)
        return self.buffers[name]

    def _register(self, argument: str, half: int | None = None) -> int:
        """Return the address of an argument's register. Vitis HLS appends _r to names that Verilog reserves."""
        tail = "" if half is None else f"_{half}"
        for name in (f"{argument}{tail}", f"{argument}_r{tail}"):
            if name in self.registers:
                return int(self.registers[name])
        raise ValueError(f"the overlay has no register {argument}{tail}: it is not this accelerator's")
