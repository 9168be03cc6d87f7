"""Exported graphs at grids of patches that nothing was trained or traced at."""

import numpy as np
import onnxruntime
import torch

from m3vit.export.onnx.attention import FORMS
from m3vit.export.onnx.graph import trace_task
from m3vit.export.onnx.lower import copied, lower_moe
from m3vit.export.onnx.parity import LIMIT
from m3vit.models.multitask import MultiTaskModel

# Batch and patch grid (rows, columns): one patch, one line, long and square ones.
GRIDS = ((1, (3, 4)), (3, (4, 3)), (2, (1, 1)), (1, (9, 5)), (1, (2, 12)), (1, (6, 6)))


def assert_exported_at_any_grid(model: MultiTaskModel) -> None:
    """The graph of a model of one task computes what the model does, with attention in each form, at every grid."""
    (task,), patch = model.config.tasks, model.backbone.patch_size
    traced = trace_task(model, task)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    sessions = [
        onnxruntime.InferenceSession(
            lower_moe(copied(traced), attention=form).SerializeToString(), options, providers=["CPUExecutionProvider"]
        )
        for form in FORMS
    ]
    for batch, (rows, columns) in GRIDS:
        images = torch.randn(batch, 3, rows * patch, columns * patch)
        with torch.no_grad():
            expected = model.eval()(images).logits[task].numpy()
        for session, form in zip(sessions, FORMS, strict=True):
            actual = session.run([task], {"image": images.numpy()})[0]
            assert np.abs(actual - expected).max() < LIMIT * np.abs(expected).max(), (rows, columns, form)
