"""What processes that train import, there once for all that the server of launching.py forks; it runs nothing."""

from m3vit.collector import resting

with resting():
    import jsonargparse
    import torch.utils.tensorboard
    from PIL import Image

    import m3vit.cli
    import m3vit.models.decoders.conv
    import m3vit.training.effects
    import m3vit.training.loop

    Image.preinit()
