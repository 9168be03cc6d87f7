"""m3vit: task-gated mixture-of-experts vision transformers, from training to ONNX and HLS."""

__version__ = "0.1.0"
