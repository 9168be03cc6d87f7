"""What an emitted project runs elsewhere: the host driver on a software model of the board, and the vendor's Tcl."""

import ctypes
import importlib
import inspect
import json
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from m3vit.export.hls.multiplexed.sources import PORTS
from m3vit.hw import weights_file
from m3vit.hw.manifest import WEIGHTS
from m3vit.hw.sim import csim
from m3vit.hw.sim.emulator import Emulator
from m3vit.kinds.decoding import assemble, decode
from m3vit.models.decoders.linear import assemble_tokens
from tests.export.models import TASKS, make_images
from tests.test_digests import flips

pytestmark = pytest.mark.slow

# --- the host driver, against a software model of registers and memory -----------------------------------------------


class ModelledDevice:
    """The accelerator's C++ behind registers, as PYNQ shows them: addresses are those of this process."""

    ARGUMENTS = tuple(PORTS)

    def __init__(self, project: Path) -> None:
        wrapper = project / "wrapper.cpp"
        wrapper.write_text(
            '#include "firmware/m3vit.h"\n'
            'extern "C" void call(void **p, unsigned task, unsigned tasks, unsigned entry) {\n'
            "    typedef vit_words w; typedef w::narrow act; typedef w::wide wide;\n"
            "    m3vit((w::image *)p[0], task, tasks, entry, (w::weights *)p[1], (w::weights *)p[2],\n"
            "          (w::gates *)p[3], (wide *)p[4], (act *)p[5], (act *)p[6], (act *)p[7], (wide *)p[8],\n"
            "          (wide *)p[9], (wide *)p[10], (wide *)p[11], (wide *)p[12]);\n}\n"
        )
        library = project / "libm3vit.so"
        sources = [str(wrapper), str(project / "firmware" / "m3vit.cpp")]
        flags = ["-O2", "-std=c++11", "-w", "-shared", "-fPIC", f"-I{project}"]
        subprocess.run([csim.find_compiler(), *flags, *sources, "-o", str(library)], check=True)
        # The engines' memories are the library's own: another project's, in the same process, has others.
        names = subprocess.run(["nm", "-D", "--defined-only", str(library)], capture_output=True, text=True, check=True)
        assert "call" in names.stdout and "vit_cfg" not in names.stdout
        self.function = ctypes.CDLL(str(library)).call
        names = ["CTRL", "GIER", "task_r", "num_tasks", "entry"]  # `task` is a word of Verilog
        for argument in self.ARGUMENTS:
            names += [f"{argument}_1", f"{argument}_2"]
        self.description = {
            "registers": {name: {"address_offset": 0x10 + 4 * place} for place, name in enumerate(names)}
        }
        self.words: dict[int, int] = {}
        self.starts = self.reads = 0

    def offset(self, name: str) -> int:
        return self.description["registers"][name]["address_offset"]

    def write(self, offset: int, value: int) -> None:
        assert offset in [entry["address_offset"] for entry in self.description["registers"].values()]
        assert 0 <= value < 1 << 32
        self.words[offset] = value
        if offset == self.offset("CTRL") and value & 1:
            pointers = [
                self.words[self.offset(f"{name}_1")] | self.words[self.offset(f"{name}_2")] << 32
                for name in self.ARGUMENTS
            ]
            array = (ctypes.c_void_p * len(pointers))(*pointers)
            self.function(array, *(self.words[self.offset(name)] for name in ("task_r", "num_tasks", "entry")))
            self.starts += 1
            self.words[offset] = 0x2

    def read(self, offset: int) -> int:
        self.reads += 1
        if self.reads % 2:  # not at once
            return 0
        value = self.words.get(offset, 0)
        self.words[offset] = value & ~0x2  # ap_done is cleared on read
        return value


class ModelledBuffer(np.ndarray):
    """A buffer as pynq.allocate returns it."""

    @property
    def device_address(self) -> int:
        return int(self.ctypes.data)

    def flush(self) -> None: ...

    def invalidate(self) -> None: ...


def modelled_allocate(shape: tuple[int, ...], dtype: Any) -> ModelledBuffer:
    return np.full(shape, 77, dtype).view(ModelledBuffer)


@contextmanager
def emitted_driver(project: Path) -> Iterator[Any]:
    """The emitted driver's module, as it would be imported on the board."""
    names = ("m3vit_driver", "m3vit_decoding", "m3vit_output_memory", "m3vit_weights_file")
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(project / "host"))
        for name in names:
            patch.delitem(sys.modules, name, raising=False)
        yield importlib.import_module("m3vit_driver")
        for name in names:
            sys.modules.pop(name, None)


@pytest.fixture
def driver(copy: Path) -> Iterator[Any]:
    with emitted_driver(copy) as module:
        yield module


def test_driver_runs_frames_and_switches_tasks(driver: Any, copy: Path) -> None:
    device = ModelledDevice(copy)
    accelerator = driver.Accelerator(device, modelled_allocate, copy)
    emulator, manifest = Emulator.open(copy / WEIGHTS), csim.read_manifest(copy)
    images = make_images(2, seed=4)
    before = {name: buffer.copy() for name, buffer in accelerator.buffers.items() if name in ("weights", "params")}
    for image, task in ((images[0], "semseg"), (images[1], "depth"), (images[0], "edge"), (images[1], "semseg")):
        accelerator.set_task(task)
        number = TASKS.index(task)
        words = emulator.run(image, number).outputs.reshape(12, -1)[:, : manifest["tasks"][number]["outputs"]]
        expected = (words * 2.0 ** -manifest["output_fracs"][number]).astype(np.float32)
        np.testing.assert_array_equal(accelerator.run(image), expected)
        prediction = accelerator.predict(image)
        logits = assemble_tokens(torch.from_numpy(expected[None]), (3, 4), manifest["upscale"], (24, 32)).numpy()
        wanted = decode(logits, manifest["tasks"][number]["decode"])[0]
        if task == "semseg":
            assert (prediction == wanted).mean() > 0.999  # ties of interpolation, rounded another way
        else:
            np.testing.assert_allclose(prediction, wanted, atol=1e-5)
    assert device.starts == 8
    for name, buffer in before.items():  # nothing is loaded again for another task
        np.testing.assert_array_equal(buffer, accelerator.buffers[name])


def test_driver_stands_alone(project: Path) -> None:
    assert (project / "host" / "m3vit_weights_file.py").read_text() == inspect.getsource(weights_file)
    for path in (project / "host").glob("*.py"):
        assert not re.search(r"^\s*(from|import) m3vit[.\s]", path.read_text(), re.MULTILINE), path.name


def test_driver_refuses_what_was_changed_since_export(driver: Any, copy: Path) -> None:
    """Before it touches a register: no accelerator is given."""
    manifest = copy / "m3vit.json"
    for path, pieces in ((manifest, flips(manifest.read_bytes(), 200)), (copy / WEIGHTS, None)):
        content = path.read_bytes()
        for spoilt in pieces or flips(content, 200):
            path.write_bytes(spoilt)
            try:
                driver.Accelerator(None, modelled_allocate, copy)
            except ValueError as error:  # bad UTF-8 and bad JSON are of this kind too
                assert "was changed since export" in str(error) or isinstance(
                    error, UnicodeError | json.JSONDecodeError
                )
            except AttributeError as error:  # what was changed is white space
                assert "'NoneType' object has no attribute 'description'" in str(error) and path == manifest
        path.write_bytes(content)


def test_driver_refuses_what_does_not_fit(driver: Any, copy: Path, tmp_path: Path) -> None:
    accelerator = driver.Accelerator(ModelledDevice(copy), modelled_allocate, copy)
    with pytest.raises(ValueError, match="has depth, semseg, edge"):
        accelerator.set_task("normals")
    with pytest.raises(ValueError, match=r"give uint8 \[24, 32, 3\]"):
        accelerator.run(np.zeros((8, 8, 3), np.uint8))
    (tmp_path / "weights.bin").write_bytes(b"nonsense" * 40)
    with pytest.raises(ValueError, match="not a weights file"):
        accelerator.load_weights(tmp_path / "weights.bin")
    accelerator.ip.function = lambda *arguments: None
    accelerator.ip.read = lambda offset: 0
    accelerator.timeout_s = 0.01
    with pytest.raises(TimeoutError, match="did not finish"):
        accelerator.run(make_images(1)[0])


def test_assembling_without_torch_is_torchs() -> None:
    rng = np.random.default_rng(0)
    outputs = rng.normal(0, 1, (12, 5 * 4)).astype(np.float32)
    for size in ((24, 32), (25, 31), (5, 6)):
        expected = assemble_tokens(torch.from_numpy(outputs[None]), (3, 4), 2, size).numpy()[0]
        np.testing.assert_allclose(assemble(outputs, (3, 4), 2, size), expected, atol=1e-5)


# --- Tcl, with the vendor's commands logged instead of run ------------------------------------------------------------


def run_tcl(script: Path, *words: str) -> list[str]:
    """Run a script in Tcl alone; return the commands it did not know, which are the vendor's."""
    tkinter = pytest.importorskip("tkinter")
    tcl = tkinter.Tcl()
    tcl.eval("set ::log {}; proc unknown {args} { lappend ::log [join $args]; return $args }; proc exit {args} {}")
    tcl.eval(f"set ::argv {{{' '.join(words)}}}")
    tcl.eval(f"source {{{script}}}")
    return [str(line) for line in tcl.splitlist(tcl.eval("set ::log"))]


def test_build_script_runs_through(report: dict[str, Any], copy: Path) -> None:
    shutil.copy(copy / "tb_data" / "expected_outputs.bin", copy / "tb_data" / "csim_outputs.bin")
    log = run_tcl(copy / "build_prj.tcl")
    assert "set_top m3vit" in log and "set_part xczu7ev-ffvc1156-2-e" in log and "csynth_design" in log
    assert "create_clock -period 3.333 -name default" in log
    assert not any(line.startswith("cosim_design") for line in log)
    for line in log:
        if line.startswith("add_files"):
            path = next(word for word in line.split() if word.endswith(".cpp"))
            assert Path(path).is_file()
    (copy / "tb_data" / "csim_outputs.bin").write_bytes(b"other")
    with pytest.raises(Exception, match="differs from tb_data/expected_outputs"):
        run_tcl(copy / "build_prj.tcl", "csim")


def test_block_design_connects_every_port_once(project: Path) -> None:
    log = run_tcl(project / "vivado_design.tcl")
    top = (project / "firmware" / "m3vit.cpp").read_text()
    bundles = set(re.findall(r"bundle=(\w+)", top))
    joined = [line for line in log if line.startswith("connect_bd_intf_net")]
    masters = [name for line in joined for name in re.findall(r"m3vit_0/m_axi_(\w+)", line)]
    assert sorted(masters) == sorted(bundles)
    assert sorted(name for line in joined for name in re.findall(r"S_AXI_HP\d_FPD", line)) == [
        f"S_AXI_HP{port}_FPD" for port in range(4)
    ]
    assert any("m3vit_0/s_axi_control" in line for line in joined)
