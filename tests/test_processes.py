"""The cores a process may use: affinity, and cgroups of both versions in a made-up tree of files."""

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest

from m3vit import pool as processes
from m3vit.pool import cgroup_quota, follow_quota, usable_cores
from tests.export.test_runtime import make_package

pytestmark = pytest.mark.process


def write(root: Path, files: dict[str, str]) -> None:
    for name, content in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(content)


V1 = "12:cpu,cpuacct:/docker/abc\n11:cpuset:/docker/abc\n3:name=systemd:/docker/abc\n"


@pytest.mark.parametrize(
    ("membership", "files", "cores"),
    [
        ("0::/\n", {"cpu.max": "150000 100000\n"}, 1.5),
        ("0::/\n", {"cpu.max": "max 100000\n"}, math.inf),
        ("0::/a/b\n", {"a/b/cpu.max": "max 100000\n", "a/cpu.max": "200000 100000\n"}, 2),
        ("0::/a/b\n", {"a/b/cpu.max": "50000 100000\n", "a/cpu.max": "200000 100000\n"}, 0.5),
        ("0::/host/path\n", {"cpu.max": "300000 100000\n"}, 3),  # as a container sees it
        ("0::/../..\n", {"cpu.max": "300000 100000\n"}, 3),
        (
            V1,
            {"cpu,cpuacct/docker/abc/cpu.cfs_quota_us": "250000", "cpu,cpuacct/docker/abc/cpu.cfs_period_us": "1e5"},
            2.5,
        ),
        (V1, {"cpu/cpu.cfs_quota_us": "100000\n", "cpu/cpu.cfs_period_us": "50000\n"}, 2),
        (V1, {"cpu/cpu.cfs_quota_us": "-1\n", "cpu/cpu.cfs_period_us": "100000\n"}, math.inf),
        ("1:cpuset:/\n", {"cpu.max": "100000 100000"}, math.inf),
        ("0::/\n", {"cpu.max": "nonsense"}, math.inf),
        ("nonsense\n\n", {"cpu.max": "100000 100000"}, math.inf),
        (None, {"cpu.max": "100000 100000"}, math.inf),
    ],
)
def test_quotas(membership: str | None, files: dict[str, str], cores: float, tmp_path: Path) -> None:
    write(tmp_path / "cgroup", files)
    if membership is not None:
        (tmp_path / "self").write_text(membership)
    assert cgroup_quota(tmp_path / "self", tmp_path / "cgroup") == cores


def test_the_smaller_of_affinity_and_quota(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(8)))
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    for quota, cores, threads in ((math.inf, 8, None), (16, 8, None), (2.5, 3, "3"), (0.5, 1, "1")):
        monkeypatch.setattr(processes, "cgroup_quota", lambda quota=quota: quota)
        assert usable_cores() == cores
        follow_quota()
        assert os.environ.pop("OMP_NUM_THREADS", None) == threads
    monkeypatch.setenv("OMP_NUM_THREADS", "5")
    follow_quota()
    assert os.environ["OMP_NUM_THREADS"] == "5"


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="no affinity on this system")
def test_one_allowed_core_is_one_thread(tmp_path: Path) -> None:
    """Of onnxruntime, whatever the size of the model and however it is asked for."""
    package = make_package(tmp_path / "onnx")
    manifest = json.loads((package / "manifest.json").read_text())
    program = (
        "import os, sys; os.sched_setaffinity(0, list(os.sched_getaffinity(0))[:1])\n"
        "from m3vit.export.runtime.package import Package, default_threads\n"
        "from m3vit.pool import usable_cores\n"
        "threads = [Package.load(sys.argv[1], threads=n)._sessions.threads for n in (None, 0, 3)]\n"
        "print(threads, default_threads({'macs': 10**12}), usable_cores())"
    )
    assert manifest["macs"] < 10**9
    done = subprocess.run([sys.executable, "-c", program, str(package)], capture_output=True, text=True)
    assert done.stdout == "[1, 1, 3] 1 1\n", done.stderr


def test_nobody_counts_the_machines_cores() -> None:
    """A quota is easily forgotten: `os.cpu_count` is asked in one place."""
    root = Path(__file__).parents[1]
    folders = ("m3vit", "export", "data", "hw", "benchmarks")
    files = [path for folder in folders for path in (root / folder).rglob("*.py") if "cpu_count" in path.read_text()]
    assert files == [root / "m3vit" / "pool.py"]
