"""train.loggers: what Weights & Biases (offline) and MLflow (in a file) get is what metrics.jsonl has; what fails."""

import json
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from m3vit.training.config import Config
from m3vit.training.loggers import Remote, open_loggers
from tests.conftest import TINY
from tests.test_cli import refused

Cli = Callable[..., subprocess.CompletedProcess]


def test_what_fails_is_said_once_and_ends_nothing(recwarn: pytest.WarningsRecorder) -> None:
    class Server:
        calls = 0

        def log_metrics(self, values: dict[str, float], step: int) -> None:
            self.calls += 1
            raise ConnectionError("no route\nto host")

    server = Server()
    logger = Remote("mlflow", server)
    for step in range(3):
        logger.write({"train/loss": 1.0}, step)
    logger.close()
    assert server.calls == 1 and [str(one.message) for one in recwarn] == [
        "mlflow gets no more values (no route): training goes on, metrics.jsonl has them"
    ]


def test_none_at_all(tmp_path: Path) -> None:
    config = Config()
    config.train.loggers = []
    loggers = open_loggers(config, tmp_path, 1)
    loggers.write({"loss": 1.0}, 1)
    loggers.close()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_both_get_what_metrics_jsonl_has(
    cli: Cli, tiny_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in ("wandb", "mlflow", "pytorch_lightning", "sqlalchemy", "alembic"):
        pytest.importorskip(module)
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    out = tmp_path / "run"
    words = ["train", "synthetic-tiny", *TINY, f"--data.root={tiny_data}", "--train.epochs=1", "--data.workers=0"]
    refused(cli(*words, "--out", out, "--train.loggers=[wandb,tensorbord]"), "loggers", "tensorbord")
    result = cli(*words, "--out", out, "--train.loggers=[wandb,mlflow]")
    assert result.returncode == 0, result.stderr
    assert not (out / "tensorboard").exists() and list((out / "wandb").glob("offline-run-*/*.wandb"))
    lines: list[dict[str, Any]] = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    import mlflow

    client = mlflow.MlflowClient(f"sqlite:///{out / 'mlflow.db'}")
    run = json.loads((out / "loggers.json").read_text())["mlflow"]
    for line in lines:
        if line["kind"] == "train":
            logged = {one.step: one.value for one in client.get_metric_history(run, "train/loss")}
            assert logged[line["step"]] == pytest.approx(line["loss"])
    assert client.get_run(run).data.params["train.epochs"] == "1"
    assert client.get_run(run).data.metrics["val/depth/rmse"] == pytest.approx(lines[-1]["depth/rmse"])
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "nowhere://server")
    result = cli(*words, "--out", tmp_path / "b", "--train.loggers=[mlflow]")
    refused(result, "train.loggers mlflow: it cannot be opened")
