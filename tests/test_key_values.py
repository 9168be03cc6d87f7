"""Values of configuration keys that no run can have: one line and exit code 2, before anything is built or written."""

import shutil
from pathlib import Path

import pytest
import yaml

from m3vit.cli import main
from m3vit.errors import InputError
from m3vit.export.runtime.package import Package
from m3vit.models.config import OURS
from m3vit.models.pretrained import of_file
from m3vit.run_folder import load_run
from m3vit.training.config import Config, read_config
from tests.conftest import TINY

HUGE = "9" * 5000  # more digits than Python turns into a number
TRUNK_ARGS = [
    "{num_heads: -1}",
    "{num_heads: 1.5}",
    "{drop_path_rate: 5}",
    "{drop_path_rate: a}",
    "{attn_drop_rate: -1}",
    "{depth: 100000000}",
    "{depth: null}",
    "{embed_dim: 9999999}",
    "{embed_dim: 1e19}",
    "{embed_dim: 32, num_heads: 5}",
    "{mlp_ratio: .inf}",
    "{patch_size: 0}",
    "{patch_size: []}",
    "{reg_tokens: -1}",
    "{norm_layer: batchnorm2d}",
    "{block_fn: Block}",
    "{pretrained_cfg_overlay: x}",
    "{unknown: 1}",
    "{1: 2}",
    *(f"{{{name}: 7}}" for name in OURS),
]
VALUES = [
    *(("model.trunk_args", value) for value in TRUNK_ARGS),
    *(("model.num_experts", value) for value in ("99999999999999999999", "0", ".nan", HUGE)),
    *(("model.expert_ratio", value) for value in ("1e19", "1e400", ".nan", "-.inf", "99999999999999999999")),
    *(("model.head_stride", value) for value in ("0", "99999999999999999999")),
    *(("model.image_size", value) for value in ("[0,48]", "[99999999999999999999,48]", "[32]")),
    ("model.router_noise", ".nan"),
    ("model.top_k", "99999999999999999999"),
    ("train.epochs", HUGE),
    ("train.epochs", "2000-99-99"),
    ("train.epochs", "99999999999999999999"),
    ("train.batch_size", "99999999999999999999"),
    ("train.lr", "1e400"),
    ("train.warmup_epochs", ".nan"),
    ("train.threads", "99999999999999999999"),
    ("train.task_weights", "{depth: .nan}"),
    ("data.workers", "99999999999999999999"),
]


@pytest.mark.parametrize(("key", "value"), VALUES, ids=lambda text: text[:40])
def test_one_line_says_what_is_wrong(key: str, value: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["profile", "synthetic-tiny", *TINY, f"--{key}={value}"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("m3vit: error: ") and len(line) < 1500


@pytest.mark.parametrize(
    ("word", "said"),
    [
        ("--model.tasks=semseg", "model.tasks is semseg: give a list, such as [semseg]"),
        ("--model.image_size=48", "model.image_size is 48: give a list, such as [48, 48]"),
        ("--model.trunk_args=3", "model.trunk_args is 3: give a mapping, {key: value, ...}"),
        ("--train.epochs=2.5", "train.epochs is 2.5: give a whole number"),
        ("--train.lr=[1,2]", "train.lr is [1, 2]: give a number"),
        ("--data.flip=maybe", "data.flip is maybe: give true or false"),
    ],
)
def test_values_of_another_type(word: str, said: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["profile", "synthetic-tiny", *TINY, word]) == 2
    assert capsys.readouterr().err == f"m3vit: error: {said}\n"


def test_too_large_for_memory(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--model.trunk_args={embed_dim: 65536, depth: 6, num_heads: 1024}", "--out", f"{tmp_path}/run"]
    assert main(["init", "synthetic-tiny", *TINY, *words]) == 2
    assert "parameters take" in capsys.readouterr().err


BROKEN = ("2000-99-99", "2000-01-01", HUGE, "&a [*a]", "[1", "!!python/name:os.system", "many", "null", "true")


@pytest.mark.parametrize("value", BROKEN, ids=lambda text: text[:20])
def test_values_in_a_run_folder(value: str, tmp_path: Path) -> None:
    path = tmp_path / "config.yaml"
    text = Config().to_yaml().replace("epochs: 100", f"epochs: {value}", 1)
    path.write_text(text)
    with pytest.raises(InputError, match=r"is not a configuration of this version|to more than .* by its aliases"):
        read_config(path)
    for whole in ("", "3", "[1]", "model: 3", "model: {}"):
        path.write_text(whole)
        with pytest.raises(InputError, match="of this version: it is empty or lacks one of the mappings model, data"):
            read_config(path)
    path.write_text("model: {trunk: [}")
    with pytest.raises(InputError, match="is not a configuration of this version: while parsing"):
        read_config(path)
    assert yaml.safe_load(Config().to_yaml())["train"]["epochs"] == 100


# --- files that stand where weights belong --------------------------------------------------------------------------

LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n"
ANNEX = b"/annex/objects/SHA256E-s86567656--4d7a.safetensors\n"
DVC = b"outs:\n- md5: 4d7a\n  size: 86567656\n  path: w.safetensors\n"


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (LFS, "a pointer of Git LFS: fetch it with git lfs pull"),
        (ANNEX, "a pointer of git-annex: fetch it with git annex get"),
        (DVC, "a file of DVC about the content: fetch it with dvc pull"),
        (b"../.git/annex/objects/w", "the text of a symbolic link"),
        (".git/annex/objects/Xx/w", "a link to .git/annex/objects/Xx/w: fetch the content with git annex get"),
        ("../.dvc/cache/files/md5/4d/7a", "fetch the content with dvc pull"),
        ("gone", "a link to gone: the file it names is missing"),
        (None, "model.safetensors.dvc stands for it: fetch it with dvc pull"),
    ],
    ids=str,
)
def test_pointers_to_weights(content: bytes | str | None, words: str, tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    (tmp_path / "config.yaml").write_text(Config().to_yaml())
    (tmp_path / "model.json").write_text("{}")
    if isinstance(content, bytes):
        path.write_bytes(content)
    elif content is not None:
        path.symlink_to(content)
    else:
        path.with_name(path.name + ".dvc").write_bytes(DVC)
    with pytest.raises(InputError, match=f"^model.weights {path} is not here: .*{words}"):
        of_file(None, {}, str(path))
    with pytest.raises(InputError, match=f"^the run's {path} is not here: .*{words}"):
        load_run(tmp_path)


def test_linked_weights_of_a_package(onnx_package: Path, tmp_path: Path) -> None:
    package, store = shutil.copytree(onnx_package, tmp_path / "onnx"), tmp_path / "store"
    weights = package / "weights.bin"
    weights.rename(store)
    weights.symlink_to(store)
    with pytest.raises(InputError, match=r"is a link out of its folder .*git annex unlock, dvc unprotect"):
        Package.load(package)
    weights.unlink()
    weights.write_bytes(LFS)
    with pytest.raises(InputError, match=r"the package's .*weights\.bin is not here: .* fetch it with git lfs pull"):
        Package.load(package)
    weights.unlink()
    store.rename(package / "real.bin")
    weights.symlink_to("real.bin")
    assert Package.load(package).session("depth")
