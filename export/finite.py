"""Weights that are no numbers are found before anything is made of them."""

import torch
from torch import nn

from m3vit.errors import InputError

_LISTED = 3  # names in a message


def require_finite(model: nn.Module) -> None:
    """Raise InputError if a parameter or buffer of a model holds NaN or infinity."""
    tensors = model.state_dict().items()
    damaged = [name for name, one in tensors if one.is_floating_point() and not torch.isfinite(one).all()]
    if damaged:
        more = f" and {len(damaged) - _LISTED} more" if len(damaged) > _LISTED else ""
        raise InputError(
            f"the model's weights are not finite (NaN or infinity in {', '.join(damaged[:_LISTED])}{more}): training "
            "diverged or the file was damaged; export another run, or train this one again"
        )
