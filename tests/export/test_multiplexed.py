"""The time-multiplexed schedule end to end: export, hls4ml's backend, C-simulation, emulator, host driver, refusals."""

import ctypes
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from m3vit.errors import InputError
from m3vit.evaluation.protocols import NetworkImage
from m3vit.export.decoding import assemble, decode
from m3vit.export.hls import leaf
from m3vit.export.hls.multiplexed import convert
from m3vit.export.hls.multiplexed.emulator import Emulator
from m3vit.export.hls.multiplexed.quantise import linear_words, norm_words, row_fracs
from m3vit.export.hls.project import Samples, export_project
from m3vit.export.hls.verify import SimulatedOutputs, verify_project
from m3vit.export.predictors import open_predictor
from m3vit.hw import csim
from m3vit.hw.boards import BOARDS, BUDGETS, Hardware, find_board, fit
from m3vit.hw.program import Image, Instruction, Memory, Op, allocate
from m3vit.models.heads import assemble_tokens
from m3vit.models.multitask import MultiTaskModel
from tests.export.test_hls import SAMPLES, TASKS, make_images, make_model, make_samples

Cli = Callable[..., subprocess.CompletedProcess]


def export(model: MultiTaskModel, out: Path, **options: Any) -> dict[str, Any]:
    """Export with few images."""
    arguments: dict[str, Any] = {"calibration": make_images(4, seed=9), "samples": make_samples(), **options}
    return export_project(model, out, schedule="multiplexed", **arguments)


@pytest.fixture(scope="session")
def model() -> MultiTaskModel:
    return make_model({"class_token": True, "init_values": 0.5})


@pytest.fixture(scope="session")
def project(model: MultiTaskModel, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An emitted project; read only."""
    out = tmp_path_factory.mktemp("multiplexed") / "project"
    export(model, out)
    return out


@pytest.fixture(scope="session")
def report(project: Path) -> dict[str, Any]:
    """What `m3vit hw csim` returns for the project, which leaves the simulator built."""
    return verify_project(project)


@pytest.fixture
def copy(project: Path, tmp_path: Path) -> Path:
    """A copy of the project, to spoil."""
    return Path(shutil.copytree(project, tmp_path / "copy", ignore=shutil.ignore_patterns("*.exe")))


# --- the backend ----------------------------------------------------------------------------------------------------


def test_hls4ml_finds_the_backend_by_its_entry_point() -> None:
    script = "import hls4ml; print(hls4ml.backends.get_available_backends())"
    printed = subprocess.run([sys.executable, "-W", "ignore", "-c", script], capture_output=True, text=True, check=True)
    assert "'vitismoe'" in printed.stdout and "WARNING" not in printed.stdout


def test_importing_hls4ml_does_not_import_torch_through_the_plugin() -> None:
    script = "import sys, m3vit.export.hls.multiplexed.backend; sys.exit('m3vit.export.hls.leaf' in sys.modules)"
    subprocess.run([sys.executable, "-W", "ignore", "-c", script], check=True)


def test_simulation_agrees_with_torch_and_the_emulator(report: dict[str, Any]) -> None:
    assert report["images"] == SAMPLES
    assert report["different_words"] == 0 and report["words"] == SAMPLES * len(TASKS) * 12 * 160
    assert report["saturated"] == {}
    for result in report["tasks"].values():
        # 16-bit weights and products; the residual stream has 20 fractional bits.
        assert result["mean_error_relative"] < 1e-3
        assert result["largest_flip_margin"] < 5e-3
        assert result["decisions"] == SAMPLES * 13


def test_traffic_is_reported_for_each_task(report: dict[str, Any], project: Path) -> None:
    traffic = report["traffic"]
    assert list(traffic) == TASKS
    for ports in traffic.values():
        assert ports["image"] == 24 * 32 * 3
    assert len({ports["gates"] for ports in traffic.values()}) == 1
    outputs = {task["name"]: task["outputs"] for task in csim.read_manifest(project)["tasks"]}
    for task, ports in traffic.items():
        assert ports["output"] == 12 * outputs[task] * 4


@pytest.mark.slow
def test_both_schedules_agree(model: MultiTaskModel, project: Path, report: dict[str, Any], tmp_path: Path) -> None:
    spatial = tmp_path / "spatial"
    export_project(model, spatial, calibration=make_images(4, seed=9), samples=make_samples())
    csim.build_bridge(spatial)
    tokens = csim.tokenise(make_images(SAMPLES), 8).repeat(len(TASKS), axis=0)
    theirs = csim.run_bridge(spatial, tokens, np.tile(np.arange(len(TASKS)), SAMPLES))
    ours = SimulatedOutputs.load(project)
    with np.load(project / "tb_data" / "csim_outputs.npz") as stored:
        routes = np.stack([stored[f"experts_{task}_0"] for task in TASKS], axis=1)
    same = (np.sort(routes, -1) == np.sort(theirs.expert_ids[0].reshape(routes.shape), -1)).all(-1)
    assert same.mean() > 0.98  # else of near ties alone
    outputs = theirs.outputs.reshape(SAMPLES, len(TASKS), 12, -1)
    for place, task in enumerate(TASKS):
        reference = outputs[:, place, :, : ours.outputs[task].shape[-1]]
        error = np.abs(ours.outputs[task] - reference)[same[:, place, 1:]]
        # Each is within 1e-3 standard deviations of torch on average; the worst of 7680 values a few times that.
        assert error.mean() < 1e-3 * reference.std() and error.max() < 1e-2 * reference.std()


def test_stand_alone_folder_checks_itself(report: dict[str, Any], copy: Path) -> None:
    done = subprocess.run(["make", "check"], cwd=copy, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert f"0 of {len(TASKS)} frames differ" in done.stdout
    assert "warning" not in done.stderr
    words = bytearray((copy / "tb_data" / "expected_outputs.bin").read_bytes())
    words[4] ^= 1
    (copy / "tb_data" / "expected_outputs.bin").write_bytes(words)
    done = subprocess.run(["./csim.exe"], cwd=copy, capture_output=True, text=True)
    assert done.returncode == 1 and f"1 of {len(TASKS)} frames differ" in done.stdout


def test_sources_compile_as_synthesis_reads_them(project: Path) -> None:
    """Without the counters and logs of C-simulation, with the standards that build_prj.tcl names."""
    for standard in ("c++11", "c++14"):
        flags = ["-Wall", "-Wextra", "-Werror", "-Wno-unknown-pragmas", "-Wno-unused-label", f"-std={standard}"]
        command = [csim.find_compiler(), *flags, "-D__SYNTHESIS__", "-fsyntax-only", "-I.", "firmware/m3vit.cpp"]
        subprocess.run(command, cwd=project, check=True)


def test_no_path_of_this_machine(project: Path) -> None:
    for path in (p for p in project.rglob("*") if p.suffix in (".md", ".yml", ".json", ".tcl", ".cpp", ".h", ".py")):
        assert str(project.parent) not in path.read_text(), path


def test_weights_map_is_of_the_weights(project: Path, model: MultiTaskModel) -> None:
    """The named tensors, read back from the file, are the model's weights within half of their last bit."""
    image = Image.read(project / convert.WEIGHTS)
    entries = {tensor["name"]: tensor for tensor in json.loads((project / "weights_map.json").read_text())["tensors"]}
    entry = entries["blocks_0_fc1.weight"]
    rows, columns = entry["shape"]
    words = image.weights[entry["offset"] : entry["offset"] + rows * columns].reshape(rows, columns).astype(np.float64)
    fc1: Any = model.backbone.trunk.blocks[0].mlp.fc1
    expected = fc1.weight.detach().numpy().astype(np.float64)
    scale = (words * expected).sum(1) / (expected**2).sum(1)
    fracs = np.log2(scale)
    np.testing.assert_allclose(fracs, np.round(fracs), atol=1e-3)  # powers of two
    assert np.abs(words - expected * 2.0 ** np.round(fracs)[:, None]).max() <= 0.5
    (params,) = (e for name, e in entries.items() if name == "blocks_0_norm1.scale_bias")
    place = next(i for i in image.program if i.op == Op.NORM).params
    assert params["offset"] == place


def test_hls4ml_compiles_and_predicts_from_the_folder(copy: Path) -> None:
    script = (
        "import hls4ml, numpy as np; x = np.load('in.npz');"
        "m = hls4ml.converters.link_existing_project('.'); m._compile();"
        "np.save('out.npy', m.predict([x['tokens'], x['task']]))"
    )
    images = make_images(2, seed=3).repeat(len(TASKS), axis=0)
    ids = np.tile(np.arange(len(TASKS)), 2)
    np.savez(copy / "in.npz", tokens=csim.tokenise(images, 8), task=ids[:, None].astype(np.float32))
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", script], cwd=copy, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    emulator, fracs = Emulator.open(copy / convert.WEIGHTS), csim.read_manifest(copy)["output_fracs"]
    expected = [
        emulator.run(image, task).outputs * 2.0 ** -fracs[task] for image, task in zip(images, ids, strict=True)
    ]
    np.testing.assert_array_equal(np.load(copy / "out.npy"), np.array(expected, np.float32).reshape(6, -1))


def test_eval_scores_by_the_emulator(project: Path, report: dict[str, Any]) -> None:
    predictor, info, _ = open_predictor(project, "cpu", 1)
    assert predictor.name == "emulator" and info["hls4ml"] == "1.3.0"
    pixels = make_images(SAMPLES)[1]
    logits = predictor.run([NetworkImage("", pixels, slice(0, 24), slice(0, 32))])
    stored = SimulatedOutputs.load(project).predictor
    expected = stored.run([NetworkImage("image1", pixels, slice(0, 24), slice(0, 32))])
    for task in TASKS:
        torch.testing.assert_close(logits[task], expected[task], rtol=0, atol=0)


# --- the host driver, against a software model of registers and memory -----------------------------------------------


class ModelledDevice:
    """The accelerator's C++ behind registers, as PYNQ shows them: addresses are those of this process."""

    ARGUMENTS = ("image", "weights", "gates", "params", "keys", "narrow_in", "narrow_out", "wide_in", "wide", "output")

    def __init__(self, project: Path) -> None:
        wrapper = project / "wrapper.cpp"
        wrapper.write_text(
            '#include "firmware/m3vit.h"\nextern "C" void call(void **p, unsigned task, unsigned tasks) {\n'
            "    typedef vit_cfg::wt_t wt; typedef vit_cfg::act_t act;\n"
            "    m3vit((uint8_t *)p[0], task, tasks, (wt *)p[1], (int16_t *)p[2], (int32_t *)p[3], (act *)p[4],\n"
            "          (act *)p[5], (act *)p[6], (int32_t *)p[7], (int32_t *)p[8], (int32_t *)p[9]);\n}\n"
        )
        library = project / "libm3vit.so"
        sources = [str(wrapper), str(project / "firmware" / "m3vit.cpp")]
        flags = ["-O2", "-std=c++11", "-w", "-shared", "-fPIC", f"-I{project}"]
        subprocess.run([csim.find_compiler(), *flags, *sources, "-o", str(library)], check=True)
        self.function = ctypes.CDLL(str(library)).call
        names = ["CTRL", "GIER", "task_r", "num_tasks"]  # `task` is a word of Verilog
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
            self.function(array, self.words[self.offset("task_r")], self.words[self.offset("num_tasks")])
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


@pytest.fixture
def driver(copy: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """The emitted driver's module, as it would be imported on the board."""
    monkeypatch.syspath_prepend(str(copy / "host"))
    for name in ("m3vit_driver", "m3vit_decoding"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    import m3vit_driver  # type: ignore[import-not-found]

    yield m3vit_driver
    for name in ("m3vit_driver", "m3vit_decoding"):
        sys.modules.pop(name, None)


def test_driver_runs_frames_and_switches_tasks(driver: Any, copy: Path) -> None:
    device = ModelledDevice(copy)
    accelerator = driver.Accelerator(device, modelled_allocate, copy)
    emulator, manifest = Emulator.open(copy / convert.WEIGHTS), csim.read_manifest(copy)
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


# --- refusals -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"weight_bits": 10}, "weight_bits is 10: the multiplexed schedule has 8, 12, 16"),
        ({"act_bits": 20}, "act_bits is 20: the multiplexed schedule has 8, 10, 12, 14, 16"),
        ({"board": "zcu999"}, "choose from kv260, zcu104, zcu102"),
    ],
)
def test_bad_options(tmp_path: Path, model: MultiTaskModel, change: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        export(model, tmp_path / "out", **change)
    assert os.listdir(tmp_path) == []


def test_unsupported_models_are_refused_before_anything_is_written(tmp_path: Path) -> None:
    for trunk, config, message in (
        ({"act_layer": "silu"}, {}, "MLP of block 0 is a Mlp with SiLU"),
        ({}, {"head": "pup"}, "the model has pup heads"),
        ({"qk_norm": True}, {}, "not plain softmax attention"),
    ):
        with pytest.raises(InputError, match=message):
            export(make_model(trunk, **config), tmp_path / "out")  # type: ignore[arg-type]
    assert os.listdir(tmp_path) == []


def test_more_moe_layers_than_streams_can_feed(tmp_path: Path) -> None:
    deep = make_model({"depth": 7}, moe_blocks=list(range(7)))
    with pytest.raises(InputError, match="give --schedule multiplexed"):
        leaf.lower(deep)
    manifest = export(deep, tmp_path / "out")
    assert len(manifest["moe_layers"]) == 7
    assert verify_project(tmp_path / "out", 1)["different_words"] == 0


@pytest.mark.parametrize(
    ("trunk", "config"),
    [
        ({"class_token": True, "reg_tokens": 2}, {"moe_blocks": [0, 1]}),
        ({"pre_norm": True}, {"router": "task_conditioned"}),
        ({"qkv_bias": False}, {"router": "single", "top_k": 1, "tasks": ["depth"]}),
        ({"class_token": True, "no_embed_class": True}, {"moe_blocks": "none"}),
        ({}, {"experts_per_task": {"depth": [0, 1], "semseg": [1, 2, 3]}}),
    ],
)
def test_other_trunks_and_routers(tmp_path: Path, trunk: dict[str, Any], config: dict[str, Any]) -> None:
    """The emulator against torch: class and register tokens, a norm before all blocks, other routers, no experts."""
    other = make_model(trunk, **config)
    manifest = export(other, tmp_path / "out", samples=make_samples())
    emulator = Emulator.open(tmp_path / "out" / convert.WEIGHTS)
    with np.load(tmp_path / "out" / "tb_data" / "samples.npz") as stored:
        for number, task in enumerate(other.config.tasks):
            expected = stored[f"output_{task}"]
            words = np.stack([emulator.run(image, number).outputs for image in stored["images"]])
            outputs = words.reshape(SAMPLES, 12, -1)[..., : expected.shape[-1]]
            outputs = outputs * 2.0 ** -manifest["output_fracs"][number]
            assert np.abs(outputs - expected).mean() < 1e-3 * expected.std()


def test_what_does_not_fit_is_refused_with_what_would(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wide = Hardware(16, 16, 16, max_in=12288, max_dim=64, max_rows=8000, max_experts=16, max_top=8, max_head=64)
    with pytest.raises(InputError, match=r"does not fit kv260 \(modelled\).*bram36 of 115; give --board zcu102"):
        fit(wide, find_board("kv260"))
    with pytest.raises(InputError, match="8193 tokens, and the queues of the multiplexed schedule hold 8192"):
        fit(Hardware(16, 16, 16, 64, 64, 8193, 16, 2, 16), find_board("zcu104"))
    small = Hardware(16, 16, 8, 1536, 384, 1025, 16, 4, 64)
    with pytest.raises(InputError, match=r"does not fit kv260.*give --board zcu104 or --board zcu102"):
        fit(small, find_board("kv260"))
    for board in (BOARDS["zcu104"], BOARDS["zcu102"]):  # ViT-S
        chosen = fit(small, board)
        for name, value in chosen.resources().items():
            assert value <= BUDGETS[name] * getattr(board, name)
    called = []
    monkeypatch.setattr(convert, "write_project", lambda *arguments: called.append(1))
    with pytest.raises(InputError, match="does not fit"):
        monkeypatch.setattr(convert, "hardware_of", lambda *arguments: wide)
        export(make_model(), tmp_path / "out", board="kv260")
    assert not called and os.listdir(tmp_path) == []


def test_too_many_tokens_are_refused_before_the_long_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(leaf, "lower", lambda *arguments, **options: 1 / 0)
    large = make_model({"patch_size": 2}, image_size=(192, 192), head_stride=2)
    images = np.zeros((1, 192, 192, 3), np.uint8)
    labels = [{task: np.zeros((192, 192)) for task in TASKS}]
    with pytest.raises(InputError, match="9216 tokens, and the queues of the multiplexed schedule hold 8192"):
        export(large, tmp_path / "out", calibration=images, samples=Samples(["0"], images, labels))
    assert os.listdir(tmp_path) == []


def test_hardware_known_before_is_that_of_the_schedule(model: MultiTaskModel, project: Path) -> None:
    needed = convert.needed_hardware(leaf.lower(model, streams=False), convert.Options())
    assert asdict(needed) == csim.read_manifest(project)["hardware"]


def test_an_interrupted_export_leaves_the_old_project(
    copy: Path, model: MultiTaskModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*arguments: Any) -> None:
        raise KeyboardInterrupt

    before = sorted(path.name for path in copy.rglob("*"))
    monkeypatch.setattr(convert, "write_check", interrupted)
    with pytest.raises(KeyboardInterrupt):
        export(model, copy)
    assert sorted(path.name for path in copy.rglob("*")) == before and os.listdir(copy.parent) == ["copy"]


def test_changed_weights_are_noticed(copy: Path) -> None:
    path = copy / convert.WEIGHTS
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    with pytest.raises(InputError, match=r"weights\.bin was changed since export"):
        verify_project(copy)
    with pytest.raises(InputError, match=r"weights\.bin was changed since export"):
        open_predictor(copy, "cpu", 1)
    path.write_bytes(data[: len(data) // 2])
    with pytest.raises(InputError, match="is cut short"):
        Image.read(path)
    path.write_bytes(b"0" * 400)
    with pytest.raises(InputError, match="not a weights file"):
        Image.read(path)


def test_frames_of_another_size_are_refused(report: dict[str, Any], project: Path) -> None:
    with pytest.raises(InputError, match=r"give uint8 \[n, 24, 32, 3\]"):
        csim.run_frames(project, np.zeros((1, 8, 8, 3), np.uint8), np.zeros(1, int))
    with pytest.raises(InputError, match="give 0 to 255"):
        csim.run_frames(project, make_images(1), np.array([300]))
    with pytest.raises(InputError, match="give uint8 with 2304 values"):
        Emulator.open(project / convert.WEIGHTS).run(np.zeros((8, 8, 3), np.uint8), 0)


# --- parts ----------------------------------------------------------------------------------------------------------


def test_instructions_and_images_survive_their_file(tmp_path: Path) -> None:
    instruction = Instruction(Op.NORM, -1, 5, 6, 7, 1 << 30, 9, 3, 2, 1, 4, 1, -1, 0, -5, 6, 7, 8, 9, (1 << 59) + 12345)
    assert Instruction.decode(instruction.encode()) == instruction
    params = np.concatenate([instruction.encode(), Instruction(Op.END).encode(), np.arange(5, dtype=np.int32)])
    image = Image(params, np.arange(-7, 70, dtype=np.int8), np.zeros(0, np.int16), Memory(1, 2, 3, 4, 5), 8)
    image.write(tmp_path / "weights.bin")
    back = Image.read(tmp_path / "weights.bin")
    for name in ("params", "weights", "gates"):
        np.testing.assert_array_equal(getattr(back, name), getattr(image, name))
    assert back.memory == image.memory and back.act_bits == 8 and back.program == [instruction]


@pytest.mark.parametrize("seed", range(5))
def test_buffers_in_use_do_not_overlap(seed: int) -> None:
    rng = np.random.default_rng(seed)
    first = rng.integers(0, 30, 40)
    buffers = [(int(rng.integers(1, 500)), int(a), int(a + rng.integers(0, 6))) for a in np.sort(first)]
    offsets, size = allocate(buffers)
    for i, (size_i, start_i, end_i) in enumerate(buffers):
        assert offsets[i] + size_i <= size
        for j, (size_j, start_j, end_j) in enumerate(buffers[:i]):
            if start_i <= end_j and start_j <= end_i:
                assert offsets[i] >= offsets[j] + size_j or offsets[j] >= offsets[i] + size_i
    assert size < sum(size for size, *_ in buffers)  # places are used again


def test_row_fractions_have_the_smaller_error() -> None:
    rng = np.random.default_rng(0)
    weight = rng.standard_t(3, (50, 64))
    fracs = row_fracs(weight, 8)
    for row, frac in zip(weight, fracs, strict=True):

        def error(f: int, row: np.ndarray = row) -> float:
            return float(((np.clip(np.floor(row * 2.0**f + 0.5), -127, 127) * 2.0**-f - row) ** 2).sum())

        holds = int(7 - np.ceil(np.log2(np.abs(row).max())))
        assert frac in (holds, holds + 1) and error(int(frac)) <= min(error(holds), error(holds + 1)) * (1 + 1e-9)
    assert {int(f - (7 - np.ceil(np.log2(np.abs(r).max())))) for r, f in zip(weight, fracs, strict=True)} == {0, 1}


def test_quantised_maps_are_near_the_float_ones() -> None:
    rng = np.random.default_rng(1)
    weight, bias, x = rng.normal(0, 0.1, (7, 30)), rng.normal(0, 5, 7), rng.integers(-(1 << 15), 1 << 15, 30)
    words = linear_words(weight, bias, 16, (16, 13), 20, "test")
    rows = words.params.reshape(7, 2).astype(np.int64)
    sums = words.weights @ x + (rows[:, 0] << (rows[:, 1] >> 8 & 63))
    assert int(np.abs(sums).max()).bit_length() < words.sum_bits <= 48
    y = np.floor(sums * 2.0 ** -((rows[:, 1] & 255) - 64) + 0.5) * 2.0**-20
    np.testing.assert_allclose(y, weight @ (x * 2.0**-13) + bias, atol=30 * 4 * 2.0**-17)
    with pytest.raises(InputError, match=r"a huge layer needs 6[0-9]-bit sums"):
        linear_words(np.ones((1, 1 << 20)), np.full(1, 2.0**30), 16, (16, 14), 20, "a huge layer")
    with pytest.raises(InputError, match="not finite"):
        linear_words(np.full((1, 2), np.nan), np.zeros(1), 16, (16, 13), 20, "test")
    assert norm_words(np.ones(8), np.zeros(8), 0.0, 20, 12, 18).eps == 1  # never 0: its square root is divided by


# --- the command line -----------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_commands(cli: Cli, tiny_run: Path, tiny_data: Path, tmp_path: Path) -> None:
    out = tmp_path / "hls"
    words = ("export", "hls", tiny_run, "--schedule", "multiplexed", "--weight-bits", "8", "--samples", "2")
    result = cli(*words, "--out", out)
    assert result.returncode == 0, result.stderr
    result = cli("hw", "csim", out)
    assert result.returncode == 0 and "output words equal the emulator's" in result.stdout, result.stderr
    result = cli("eval", out, "--data.root", tiny_data, "--workers", 1)
    assert result.returncode == 0 and "emulator" in result.stdout, result.stderr
    result = cli(*words, "--out", tmp_path / "no", "--board", "zcu1")
    assert result.returncode == 2 and result.stderr.count("\n") == 1
    assert "choose from kv260, zcu104, zcu102" in result.stderr and not (tmp_path / "no").exists()
