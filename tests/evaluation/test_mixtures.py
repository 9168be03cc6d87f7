"""What gates of a decoder do: means against loops over patches, and that each chart can be drawn."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from m3vit.data.nyud import NYUD
from m3vit.evaluation.evaluate import normalised
from m3vit.evaluation.mixtures import check_mixed, gather_mixtures
from m3vit.evaluation.protocols import network_image
from m3vit.evaluation.routing import patch_bins
from m3vit.models.config import ModelConfig
from m3vit.models.multitask import MultiTaskModel
from m3vit.report.charts import svg
from m3vit.report.mixtures import mixture_charts
from m3vit.tasks import kind_of

TRUNK = {"patch_size": 8, "embed_dim": 32, "depth": 3, "num_heads": 2, "mlp_ratio": 2}
TASKS = ["semseg", "edge"]


def make(**head: Any) -> MultiTaskModel:
    torch.manual_seed(0)
    arguments = {"blocks": 2, "experts": 2, "width": 4, "head_width": 3} | head
    model = MultiTaskModel(
        ModelConfig(
            trunk="vit_tiny_patch16_224", trunk_args=TRUNK, image_size=(32, 48), tasks=TASKS, num_experts=2, top_k=1,
            head="taskexpert", head_args=arguments,
        )
    )  # fmt: skip
    with torch.no_grad():
        for parameter in model.heads.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.5)
    return model.eval()


@pytest.mark.parametrize("memory", [True, False])
def test_means_equal_loops_over_patches(memory: bool, tiny_data: Path) -> None:
    model, split = make(memory=memory), NYUD(tiny_data, "val")
    samples = [split.load(index) for index in range(2)]
    found = gather_mixtures(model, samples, "nyud")
    assert found.parts == (("e0", "e1", "memory") if memory else ("e0", "e1"))
    assert found.blocks == (0, 2) and found.patches == 2 * 24
    np.testing.assert_allclose(found.weights_LRK.sum(axis=2), 1, rtol=1e-5)
    names, patches, by_label = found.labels["semseg"]
    sums, counts = np.zeros((len(names), len(found.parts))), np.zeros(len(names))
    norms = []
    for sample in samples:
        images = normalised([network_image("A", "", sample.image, (32, 48))], model.normalisation)
        features, _ = model.backbone(images, (0, 1), model.heads.blocks)
        with torch.no_grad():
            state = model.heads.states(features, TASKS)["semseg"][1]
        bins = patch_bins(kind_of("semseg"), sample.labels["semseg"], (4, 6), len(names))
        for patch in range(24):
            norms.append(float(state.memory[0, patch].square().sum().sqrt()))
            if bins[patch] < len(names):
                sums[bins[patch]] += state.weights[0, patch].numpy()
                counts[bins[patch]] += 1
    assert patches.tolist() == counts.tolist() and counts.any()
    seen = counts > 0
    np.testing.assert_allclose(by_label[1][seen], sums[seen] / counts[seen, None], rtol=1e-4)
    assert np.isnan(by_label[1][~seen]).all()
    assert found.norms_LR[1, 0] == pytest.approx(np.mean(norms), rel=1e-4)
    assert found.start_R[0] == pytest.approx(float(model.heads.own["semseg"].start.detach().norm()))
    values = found.to_json()
    assert list(values["memory_norm"]["edge"]) == ["start", "0", "2"]
    rows = values["labels"]["semseg"]["weights"]["2"]
    assert [row is None for row in rows] == (~seen).tolist()
    charts = list(mixture_charts(found))
    assert len(charts) == 4 and all("<svg" in svg(figure) for _, figure in charts)


def test_other_decoders_have_none() -> None:
    config = make().config
    config.head, config.head_args = "linear", {}
    assert check_mixed(make()) and not check_mixed(MultiTaskModel(config))
