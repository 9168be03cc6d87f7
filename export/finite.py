"""Weights that are no numbers are found before anything is made of them."""

from torch import nn

from m3vit.errors import InputError
from m3vit.models.finite import broken_names

_LISTED = 3  # names in a message


def require_finite(model: nn.Module) -> None:
    """Raise InputError if a parameter or buffer of a model holds NaN or infinity."""
    if damaged := broken_names(model.state_dict()):
        more = f" and {len(damaged) - _LISTED} more" if len(damaged) > _LISTED else ""
        raise InputError(
            f"the model's weights are not finite (NaN or infinity in {', '.join(damaged[:_LISTED])}{more}): training "
            "diverged or the file was damaged; export another run, or train this one again"
        )
