"""A run's config.yaml that was edited: one line that says which value cannot be."""

from pathlib import Path

import pytest

from m3vit.errors import InputError
from m3vit.training.config import Config, read_config


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("epochs: 2000-99-99", "month must be in 1..12"),
        ("epochs: 2000-01-01", "train.epochs is '2000-01-01', expected"),
        ("epochs: " + "9" * 5000, "4300 digits"),
        ("epochs: many", "train.epochs is 'many'"),
        ("epochs: 1.5", "train.epochs is '1.5'"),
        ("epochs: true", "train.epochs is 'True'"),
        ("epochs: [1]", "train.epochs is '\\[1\\]'"),
        ("epochs: null", "train.epochs is 'None'"),
        ("epochs: &a [*a]", "by its aliases"),
        ("epochs: !!python/object:os.system 1", "could not determine a constructor"),
        ("epochs: \x00", "special characters are not allowed"),
        ("epoch: 1", "unexpected keyword argument 'epoch'"),
    ],
)
def test_values_that_cannot_be(tmp_path: Path, line: str, words: str) -> None:
    text = Config().to_yaml()
    (tmp_path / "config.yaml").write_text(text.replace(f"epochs: {Config().train.epochs}\n", line + "\n", 1))
    with pytest.raises(InputError, match=words) as caught:
        read_config(tmp_path / "config.yaml")
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 600


def test_what_was_written_is_read_again(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text(Config().to_yaml())
    assert read_config(tmp_path / "config.yaml").to_yaml() == Config().to_yaml()
