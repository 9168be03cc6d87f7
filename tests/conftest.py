"""Refuse to test code that is not this checkout's; fixtures shared by all folders."""

import gc
import hashlib
import os
import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import suppress
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from filelock import FileLock
from PIL import Image

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # as m3vit.cli does, and before torch is imported
if "PYTEST_XDIST_WORKER" in os.environ:  # each core has a worker of its own
    os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ["ORT_DISABLE_TELEMETRY"] = "1"  # before onnxruntime is imported; m3vit: tests/export/test_telemetry.py
ROOT = Path(__file__).resolve().parents[1]
os.environ.setdefault("CXX", str(ROOT / "tests" / "g++-O0.sh"))


def memory() -> int:
    """Return the bytes of memory that this machine has left, or a container may take at all if that is less."""
    lines, limit = Path("/proc/meminfo").read_text().splitlines(), Path("/sys/fs/cgroup/memory.max")
    left = next(2**10 * int(line.split()[1]) for line in lines if line.startswith("MemAvailable:"))
    most = limit.read_text().strip() if limit.is_file() else "max"
    return left if most == "max" else min(left, int(most))


# What tests write lies in memory where there is room: they damage and mend files a thousand times and end each training
# with a flush, and waited a minute and more for the disk. TMPDIR and PYTEST_DEBUG_TEMPROOT say otherwise.
with suppress(OSError, ValueError, StopIteration):
    if not {"TMPDIR", "PYTEST_DEBUG_TEMPROOT"} & set(os.environ):
        # They leave 0.4 GB at their most, and four processes of them take 5.
        if shutil.disk_usage("/dev/shm").free > 2**31 and memory() > 2**33:
            os.environ["PYTEST_DEBUG_TEMPROOT"] = "/dev/shm"


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--update-golden", action="store_true", help="write stored results anew; look at the difference")


# Making these takes seconds: tracing one task for ONNX takes four, g++ as many.
SLOW_FIXTURES = {"onnx_package", "hls_project", "spatial", "builds"}


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark tests by their fixtures, and put the files with most slow tests first: the workers then end together."""
    slow: Counter[Path] = Counter()
    for item in items:
        fixtures = set(getattr(item, "fixturenames", ()))
        if fixtures & SLOW_FIXTURES:
            item.add_marker("slow")
        if "process" in fixtures:
            item.add_marker("process")
        slow[item.path] += any(item.iter_markers("slow")) or any(item.iter_markers("process"))
    items.sort(key=lambda item: -slow[item.path])  # stable


def pytest_collectstart() -> None:
    gc.disable()  # until all is imported


def pytest_collection_finish() -> None:
    """What has been imported stays: the collector need not look through a million objects again and again, nor as often
    as it does by default through what a traced graph makes."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(20_000, 20, 20)
    gc.enable()


def pytest_unconfigure() -> None:
    """Nor need it look through all that is left when the process ends."""
    gc.freeze()


def pytest_sessionstart() -> None:
    """Stop if another checkout's packages would be tested, as happens when an old environment is activated."""
    if os.environ.get("M3VIT_TEST_INSTALLED"):  # a built wheel, on purpose
        return
    spec = find_spec("m3vit")
    found = Path(spec.origin).resolve().parent if spec and spec.origin else None
    if found != ROOT / "m3vit":
        pytest.exit(f"m3vit is {found}, not {ROOT / 'm3vit'}. Run: pip install -e '.[test]'", returncode=4)


Cli = Callable[..., subprocess.CompletedProcess]


@pytest.fixture(scope="session")
def process() -> Cli:
    """Run the command line as a user does: in a process of its own."""

    def run(*words: object, timeout: float = 300, **kwargs: object) -> subprocess.CompletedProcess:
        command = [sys.executable, "-m", "m3vit.cli", *map(str, words)]
        return subprocess.run(command, capture_output=True, text=True, timeout=timeout, **kwargs)  # type: ignore[call-overload]

    return run


@pytest.fixture(scope="session")
def cli() -> Cli:
    """Run the command line in this process, with the same result; `process` where the process is the point."""
    from tests.command_line import call

    return lambda *words: call(words)


def once(tmp_path_factory: pytest.TempPathFactory, name: str, make: Callable[[Path], object]) -> Path:
    """Return the folder `name` that `make` writes: once for all of pytest-xdist's processes. It is read only."""
    base = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        base = base.parent  # of this run, above each process's own
    folder, done = base / "shared" / name, base / f"{name}.done"
    with FileLock(base / f"{name}.lock"):
        if not done.exists():
            folder.parent.mkdir(exist_ok=True)
            make(folder)
            done.touch()
    return folder


@pytest.fixture(scope="session", autouse=True)
def traced_once(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Trace each small graph once in this run, whichever test and process asks for it: some 4 s of a core each.

    `_trace` is a function of the model's weights, its configuration and its arguments; these are the key. Models of
    decoders that a test brings are traced each time.
    """
    graph = sys.modules.get("m3vit.export.onnx.graph")
    if graph is None:  # no test that was collected exports
        yield
        return
    import onnx

    base = tmp_path_factory.getbasetemp()
    folder = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "traces"
    folder.mkdir(exist_ok=True)
    real = graph._trace

    def trace(
        model: Any, function: Any, inputs: dict[str, Any], axes: Any, outputs: Any, opset: int, *more: Any
    ) -> Any:
        state = model.state_dict()
        foreign = not type(model.heads).__module__.startswith("m3vit.")
        if foreign or sum(tensor.nbytes for tensor in state.values()) > 2**23:
            return real(model, function, inputs, axes, outputs, opset, *more)
        shapes = {name: tuple(value.shape) for name, value in inputs.items()}
        said = (type(function).__name__, shapes, axes, list(outputs), opset, more, model.config)
        key = hashlib.sha256(repr(said).encode())
        for name, tensor in sorted(state.items()):
            key.update(
                f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode() + tensor.cpu().double().numpy().tobytes()
            )
        path = folder / f"{key.hexdigest()}.onnx"
        with FileLock(path.with_suffix(".lock")):
            if not path.exists():
                path.write_bytes(real(model, function, inputs, axes, outputs, opset, *more).SerializeToString())
        return onnx.ModelProto.FromString(path.read_bytes())

    graph._trace = trace
    yield
    graph._trace = real


@pytest.fixture(scope="session", autouse=True)
def tried_once() -> Iterator[None]:
    """Try each model's configuration out once in this process before it is trained: some 0.1 s each, most are alike."""
    starting = sys.modules.get("m3vit.training.starting")
    if starting is None:  # no test that was collected trains
        yield
        return
    from m3vit.label_sets import LABEL_SETS
    from m3vit.models.decoders import DECODERS
    from m3vit.tasks import TASKS

    real, tried = starting.try_out, list[Any]()

    def try_out(config: Any) -> None:
        # What a plug-in adds under a name may differ from test to test.
        labels, tasks = LABEL_SETS.get(config.label_set), [TASKS.get(task) for task in config.tasks]
        key = (repr(config), DECODERS.get(config.head), labels, tasks)
        if key not in tried:
            real(config)
            tried.append(key)

    starting.try_out = try_out
    yield
    starting.try_out = real


def write_scene(root: Path, name: str, rng: np.random.Generator, size: tuple[int, int]) -> None:
    """Write one sample in the NYUD_MT layout: a wall and a floor that meet at a random row."""
    height, width = size
    row = int(rng.integers(height // 4, 3 * height // 4))
    rows = np.arange(height)[:, None].repeat(width, 1)
    floor = rows >= row
    image = np.where(floor[..., None], [120, 90, 60], [200, 210, 220]) + rng.integers(-20, 20, (height, width, 3))
    normals = np.where(floor[..., None], [0.0, 1.0, 0.0], [0.0, 0.0, 1.0]).astype(np.float32)
    depth = np.where(floor, 4.0 - 2.0 * (rows - row) / height, 4.0).astype(np.float32)
    edge = (rows == row).astype(np.float32)
    Image.fromarray(image.clip(0, 255).astype(np.uint8)).save(root / "images" / f"{name}.jpg", quality=95)
    Image.fromarray(np.where(floor, 2, 1).astype(np.uint8)).save(root / "segmentation" / f"{name}.png")
    np.save(root / "normals" / f"{name}.npy", normals)
    np.save(root / "depth" / f"{name}.npy", depth)
    np.save(root / "edge" / f"{name}.npy", edge)


@pytest.fixture(scope="session")
def make_data() -> Callable[..., Path]:
    """Return a function that writes a tiny data set in the NYUD_MT layout."""

    def make(root: Path, train: int = 10, val: int = 3, size: tuple[int, int] = (32, 48)) -> Path:
        rng = np.random.default_rng(0)
        for folder in ("images", "segmentation", "normals", "depth", "edge", "gt_sets"):
            (root / folder).mkdir(parents=True, exist_ok=True)
        names = [f"{index:04d}" for index in range(train + val)]
        for name in names:
            write_scene(root, name, rng, size)
        (root / "gt_sets" / "train.txt").write_text("\n".join(names[:train]) + "\n")
        (root / "gt_sets" / "val.txt").write_text("\n".join(names[train:]) + "\n")
        return root

    return make


@pytest.fixture(scope="session")
def tiny_data(make_data: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny data set, read only."""
    return once(tmp_path_factory, "tiny_data", make_data)


# Overrides that turn the recipe synthetic-tiny into a model of seconds.
TINY = [
    "--model.image_size=[32,48]",
    "--model.trunk_args={patch_size: 8, embed_dim: 32, depth: 2, num_heads: 2, mlp_ratio: 2, class_token: false, "
    "global_pool: ''}",
    "--model.num_experts=4",
    "--train.batch_size=4",
    "--train.threads=1",
    "--train.eval_epochs=0",
    "--train.log_steps=1",
]
PUP = ["--model.head=pup", "--model.image_size=[16,24]"]  # its 256 channels cost most of a step, by the pixel
TASKEXPERT = ["--model.head=taskexpert", "--model.head_args={blocks: 2, experts: 2, width: 6, head_width: 5}"]


@pytest.fixture(scope="session")
def tiny_run(cli: Cli, tiny_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run folder, trained for two epochs and evaluated; read only."""

    def make(run: Path) -> None:
        for words in (
            ("train", "synthetic-tiny", *TINY, f"--data.root={tiny_data}", "--train.epochs=2", "--out", run),
            ("eval", run),
        ):
            succeed(cli(*words))

    return once(tmp_path_factory, "tiny_run", make)


@pytest.fixture(scope="session")
def onnx_package(cli: Cli, tiny_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The ONNX package of the tiny run; read only. What the command printed is beside it, in onnx_package.txt."""

    def make(out: Path) -> None:
        result = cli("export", "onnx", tiny_run, "--out", out)
        succeed(result)
        out.with_suffix(".txt").write_text(result.stdout)

    return once(tmp_path_factory, "onnx_package", make)


@pytest.fixture(scope="session")
def hls_project(cli: Cli, tiny_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The spatial HLS project of the tiny run, three images stored; its files are not to be changed."""
    return once(
        tmp_path_factory,
        "hls_project",
        lambda out: succeed(cli("export", "hls", tiny_run, "--out", out, "--samples", 3)),
    )


def succeed(result: subprocess.CompletedProcess) -> None:
    """The command ended with exit code 0."""
    assert result.returncode == 0, result.stderr
