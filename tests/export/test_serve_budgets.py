"""Budgets of a package behind HTTP and on the command line: by request, and a smaller one under load."""

import io
import json
import shutil
import subprocess
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import helper, numpy_helper

from m3vit.digests import read_sealed_json, write_sealed_json
from tests.export.serving import Server, serving
from tests.export.test_runtime import CHANNELS, file_entry, make_image, make_package
from tests.export.test_serve import png
from tests.test_cli import refused

Cli = Callable[..., subprocess.CompletedProcess]
TIMES = {"full": 1.0, "light": 0.5}  # what a budget's logits are of the first one's


def make_budgets(folder: Path) -> Path:
    """A package of two budgets: the graphs of the second give half of what the first's do, and say fewer MACs."""
    make_package(folder)
    manifest = read_sealed_json(folder / "manifest.json", "")
    light: dict[str, dict] = {}
    for task in CHANNELS:
        model = onnx.load(folder / f"{task}.onnx")
        (node,) = model.graph.node
        node.output[0] = "picked"
        model.graph.node.append(helper.make_node("Mul", ["picked", "half"], [task]))
        model.graph.initializer.append(numpy_helper.from_array(np.float32(0.5), "half"))
        onnx.save(model, folder / f"{task}.light.onnx")
        manifest["tasks"][task] |= {"macs": 100, "experts": {}}
        light[task] = {"graphs": {"fp32": file_entry(folder / f"{task}.light.onnx")}, "macs": 40, "experts": {}}
    manifest |= {"budget": "full", "budgets": {"light": {"tasks": light, "all_tasks": None}}}
    write_sealed_json(folder / "manifest.json", manifest)
    return folder


@pytest.fixture(scope="module")
def package(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_budgets(tmp_path_factory.mktemp("package") / "onnx")


@pytest.fixture(scope="module")
def server(package: Path) -> Iterator[Server]:
    with serving(package, "--concurrency", 1, "--fallback", "light") as running:
        yield running


@pytest.mark.process
def test_a_request_names_its_budget_and_the_answer_says_it(server: Server) -> None:
    image, data = make_image(16, 20), png(16, 20)
    expected = image[..., 0].astype(np.float32) / 255
    for query, name in (("", "full"), ("&budget=full", "full"), ("&budget=light", "light")):
        _, headers, body = server.post(f"/predict/depth?format=npy{query}", data)
        assert headers["m3vit-budget"] == name
        np.testing.assert_allclose(np.load(io.BytesIO(body)), TIMES[name] * expected, rtol=1e-5)
        figures = json.loads(server.post(f"/predict/all?format=json{query}", data)[2])
        assert (figures["budget"], figures["fallback"]) == (name, False)
    status, message = server.error("POST", "/predict/depth?budget=slow", data, {"Content-Type": "image/png"})
    assert status == 422 and message.endswith("has no budget 'slow': choose from full, light")
    told = json.loads(server.request("GET", "/tasks")[2])
    assert (told["budgets"], told["budget"], told["fallback"]) == (["full", "light"], "full", "light")
    assert 0 < told["macs"]["light"] < told["macs"]["full"]


@pytest.mark.process
def test_under_load_requests_without_a_budget_get_the_smaller_one(server: Server) -> None:
    data, expected = png(320, 400), make_image(320, 400)[..., 0].astype(np.float32) / 255

    def ask(place: int) -> tuple[str, np.ndarray, bool]:
        named = place % 4 == 3
        _, headers, body = server.post(f"/predict/depth?format=npy{'&budget=full' if named else ''}", data)
        return headers["m3vit-budget"], np.load(io.BytesIO(body)), named

    with ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(ask, range(24)))
    for said, values, named in answers:
        name, _, fallback = said.partition("; ")
        assert fallback in ("", "fallback") and (name == "light") == bool(fallback)
        assert not (named and fallback), "a request that names its budget gets it"
        np.testing.assert_allclose(values, TIMES[name] * expected, rtol=1e-5)
    assert {said for said, *_ in answers} == {"full", "light; fallback"}
    assert server.metric("m3vit_fallbacks_total") == sum("fallback" in said for said, *_ in answers)


def test_predict_takes_a_budget(cli: Cli, package: Path, tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(png(16, 20))
    found = {}
    for name in ("full", "light"):
        words = ("predict", package, tmp_path / "a.png", "--task", "depth", "--raw", "--budget", name)
        result = cli(*words, "--out", tmp_path / name)
        assert result.returncode == 0, result.stderr
        (values,) = (tmp_path / name).rglob("*.npy")
        found[name] = np.load(values)
    np.testing.assert_allclose(found["light"], 0.5 * found["full"], rtol=1e-5)
    words = ("predict", package, tmp_path / "a.png", "--task", "depth", "--out", tmp_path / "x")
    refused(cli(*words, "--budget", "slow"), "has no budget 'slow': choose from full, light")
    refused(cli("serve", package, "--fallback", "slow"), "has no budget 'slow'")
    whole = 100 * len(CHANNELS)
    refused(cli("serve", package, "--fallback", "full"), f"takes {whole} MACs, and the budget full that it relieves")
    other = tmp_path / "other"
    shutil.copytree(package, other)
    manifest = read_sealed_json(other / "manifest.json", "")
    del manifest["budgets"], manifest["budget"]
    write_sealed_json(other / "manifest.json", manifest)
    refused(cli("serve", other, "--fallback", "light"), "has no budgets to choose from")
