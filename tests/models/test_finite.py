"""Tensors that are no numbers are found wherever they are, in every kind of float."""

import numpy as np
import pytest
import torch

from m3vit.models.finite import broken_names, is_finite, not_finite


@pytest.mark.parametrize("kind", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_one_element_that_is_no_number_is_found(kind: torch.dtype) -> None:
    for count in (1, 2, 17, 4096):
        for value in (np.nan, np.inf, -np.inf):
            values = torch.randn(count).to(kind)
            assert is_finite(values)
            values[count // 2] = value
            assert not is_finite(values) and not is_finite(values.flip(0).view(1, -1, 1))


def test_what_has_no_such_element_is_finite() -> None:
    assert is_finite(torch.zeros(0)) and is_finite(torch.tensor([1, 2])) and is_finite(torch.tensor(True))
    state = {"a": torch.ones(2), "b": torch.tensor([1.0, np.nan]), "count": torch.tensor(3)}
    assert broken_names(state) == ["b"] and not_finite(state) == "NaN or Inf in 1 of 3 tensors, such as b"
    assert not_finite({"a": torch.ones(2)}) == ""
