"""Which of several processes this is: from torchrun's variables, from srun's, or refused with the variable's name."""

import importlib.util
import sys
from pathlib import Path
from unittest.mock import patch

import pytest

from m3vit.errors import InputError
from m3vit.evaluation.artefacts import choose_device
from m3vit.launched import ALONE, Place, join, place
from m3vit.training import launch

SRUN = {
    "SLURM_JOB_ID": "1234",
    "SLURM_STEP_ID": "0",
    "SLURM_STEP_NUM_TASKS": "4",
    "SLURM_NTASKS": "4",
    "SLURM_PROCID": "3",
    "SLURM_LOCALID": "1",
    "SLURM_STEP_NUM_NODES": "2",
    "SLURM_STEP_TASKS_PER_NODE": "2(x2)",
    "SLURM_STEP_NODELIST": "node[07-08]",
}
TORCHRUN = {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2"}
TORCHRUN |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}


def test_processes_of_srun_and_torchrun() -> None:
    assert place({}) == ALONE
    assert join(dict(TORCHRUN)) == Place(1, 2, 1, 2)
    variables = dict(SRUN)
    assert join(variables) == Place(3, 4, 1, 2)
    # As torchrun would have set them: 15000 + (31 * 1234 + 0) % 15000.
    assert {name: variables[name] for name in variables if name not in SRUN} == {
        **{"RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2", "GROUP_RANK": "1"},
        **{"MASTER_ADDR": "node07", "MASTER_PORT": "23254"},
    }
    assert join(variables) == Place(3, 4, 1, 2), "once joined, it stays so"
    inside = {**SRUN, "SLURM_STEP_NUM_TASKS": "1", "SLURM_NTASKS": "1", "SLURM_PROCID": "0", **TORCHRUN}
    assert join(inside) == Place(1, 2, 1, 2), "torchrun within srun: torchrun's word counts"


def test_each_process_of_srun_takes_its_own_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also before the processes have joined, when torchrun's variables are not set yet."""
    for name in TORCHRUN:
        monkeypatch.delenv(name, raising=False)
    for name, value in SRUN.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    assert choose_device("auto") == "cuda:1"


@pytest.mark.parametrize(
    ("nodes", "first"),
    [("node[07-08]", "node07"), ("a,b", "a"), ("n1", "n1"), ("r[1,3-4]x,b", "r1x"), ("gpu-a.b-1,c[1-2]", "gpu-a.b-1")],
)
def test_the_first_node_of_a_list(nodes: str, first: str) -> None:
    variables = {**SRUN, "SLURM_STEP_NODELIST": nodes}
    join(variables)
    assert variables["MASTER_ADDR"] == first


@pytest.mark.parametrize(
    "allocation",
    [
        {"SLURM_JOB_ID": "1", "SLURM_NTASKS": "2", "SLURM_PROCID": "0", "SLURM_LOCALID": "0"},  # an sbatch script
        {"SLURM_JOB_ID": "1", "SLURM_NTASKS": "8"},  # salloc's shell
        {"SLURM_JOB_ID": "1", "SLURM_NTASKS": "8", "SLURM_STEP_ID": "4294967290", "SLURM_PROCID": "0"},
        {**SRUN, "SLURM_STEP_NUM_TASKS": "1", "SLURM_PROCID": "0"},  # srun --ntasks=1 in a larger allocation
    ],
)
def test_one_process_within_an_allocation_is_one(allocation: dict[str, str]) -> None:
    before = dict(allocation)
    assert join(allocation) == ALONE and allocation == before


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"RANK": "x"}, "RANK is 'x'"),
        ({"RANK": "-1"}, "RANK is '-1'"),
        ({"RANK": "2"}, "RANK is 2 and WORLD_SIZE 2"),
        ({"RANK": "9" * 5000}, "RANK is '9999"),
        ({"WORLD_SIZE": ""}, "WORLD_SIZE is ''"),
        ({"WORLD_SIZE": "0"}, "WORLD_SIZE is '0'"),
        ({"WORLD_SIZE": None}, "RANK is 1 and WORLD_SIZE not set"),
        ({"LOCAL_WORLD_SIZE": None}, "LOCAL_WORLD_SIZE not set"),
        ({"LOCAL_WORLD_SIZE": "3"}, "LOCAL_WORLD_SIZE 3"),
        ({"LOCAL_RANK": "2"}, "LOCAL_RANK is 2"),
        ({"LOCAL_RANK": "0.5"}, "LOCAL_RANK is '0.5'"),
        ({"MASTER_ADDR": None}, "MASTER_ADDR is not set"),
        ({"MASTER_PORT": "http"}, "MASTER_PORT is 'http'"),
        ({"MASTER_PORT": "65536"}, "MASTER_PORT is 65536"),
    ],
)
def test_what_torchrun_would_not_set_is_refused(changes: dict[str, str | None], words: str) -> None:
    variables = {name: value for name, value in {**TORCHRUN, **changes}.items() if value is not None}
    with pytest.raises(InputError, match=words) as caught:
        join(variables)
    assert len(str(caught.value)) < 400


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"SLURM_PROCID": "4"}, "SLURM_PROCID is 4"),
        ({"SLURM_PROCID": "x"}, "SLURM_PROCID is 'x'"),
        ({"SLURM_STEP_NUM_TASKS": "many"}, "SLURM_STEP_NUM_TASKS is 'many'"),
        ({"SLURM_STEP_TASKS_PER_NODE": "3,1"}, "start as many on each node"),
        ({"SLURM_STEP_NUM_NODES": "3"}, "start as many on each node"),
        ({"SLURM_LOCALID": "0"}, "--distribution=block"),  # cyclic: task 3 is number 1 of its node
        ({"SLURM_STEP_NODELIST": ""}, "set MASTER_ADDR"),
    ],
)
def test_steps_that_cannot_train_together_are_refused(changes: dict[str, str], words: str) -> None:
    with pytest.raises(InputError, match=words):
        join({**SRUN, **changes})


def test_a_task_without_its_step_is_refused() -> None:
    with pytest.raises(InputError, match="SLURM_PROCID is 1, but"):
        place({"SLURM_JOB_ID": "1", "SLURM_NTASKS": "2", "SLURM_PROCID": "1"})


def test_the_whole_of_lightning_does_for_fabric(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where lightning_fabric is not there, Lightning has it, and imports torchmetrics."""
    own = {
        "torchmetrics/__init__.py": "",
        "lightning/__init__.py": "import torchmetrics",
        "lightning/fabric/__init__.py": "class Fabric: ...",
        "lightning/fabric/plugins/__init__.py": "",
        "lightning/fabric/plugins/environments.py": "LightningEnvironment = TorchElasticEnvironment = None",
        "lightning/fabric/strategies.py": "DDPStrategy = ModelParallelStrategy = None",
    }
    for name, text in own.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    monkeypatch.syspath_prepend(str(tmp_path))
    spec = importlib.util.spec_from_file_location("launch_again", launch.__file__)
    assert spec and spec.loader
    again = importlib.util.module_from_spec(spec)
    with patch.dict(sys.modules, {"lightning_fabric": None}):  # what is imported in it is forgotten after it
        for name in [name for name in sys.modules if name.partition(".")[0] in ("torchmetrics", "lightning")]:
            del sys.modules[name]
        spec.loader.exec_module(again)
    assert again.Fabric.__module__ == "lightning.fabric"
