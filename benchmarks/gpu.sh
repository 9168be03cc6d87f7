#!/usr/bin/env bash
# All that is to be measured on one CUDA GPU, in one call of under 8 minutes: tests/cuda, benchmarks/moe.py and
# benchmarks/training.py.
#
#     bash benchmarks/gpu.sh OUT [WHEELS]
#
# OUT gets moe.json, training.json and a log of each part. Exit code 1 if a part failed; the others run all the same.
#
# Needs no network and no installation: the packages are laid out as a wheel has them in a temporary folder, which goes
# before whatever is installed. Needs torch, torchvision, timm, lightning-fabric (or lightning), safetensors, scipy, h5py, pyyaml, rich,
# tensorboard and pytest. Where others are missing, take them there as wheels in a folder WHEELS, made where pip works
# (PY is the GPU machine's Python, such as 3.12):
#
#     pip download --no-deps --only-binary=:all: --python-version PY -d WHEELS \
#         jsonargparse docstring-parser typeshed-client torchjd
#
# Without jsonargparse the tests of the command line are skipped, without torchjd the gradient methods.
# M3VIT_TEST_DEVICE=cpu tries all of it on tiny sizes, which measures nothing.
set -uo pipefail
if [ $# -lt 1 ]; then
    echo "usage: bash benchmarks/gpu.sh OUT [WHEELS]" >&2
    exit 2
fi
mkdir -p "$1" || exit 2
out="$(cd "$1" && pwd)"
wheels="${2:+$(cd "$2" && pwd)}"
cd "$(dirname "$0")/.." || exit 2
python="${PYTHON:-python3}"
device="${M3VIT_TEST_DEVICE:-cuda}"
site="$(mktemp -d)"
trap 'rm -rf "$site"' EXIT
cp -rL m3vit tests benchmarks pyproject.toml "$site" || exit 2
export PYTHONPATH="$site:$site/packages${PYTHONPATH:+:$PYTHONPATH}" M3VIT_TEST_INSTALLED=1 M3VIT_TEST_DEVICE="$device"
if [ -n "$wheels" ]; then
    "$python" -m pip install -q --no-index --no-deps --no-compile --target "$site/packages" "$wheels"/*.whl || exit 2
fi
cd "$site" || exit 2

sizes=(--size 384 512 --batch 4 --repeats 8)
training=(--size 480x640 --batch 8 --steps 5)
slower=1
if [ "$device" = cpu ]; then
    sizes=(--size 64 --batch 2 --repeats 1 --images 1)
    training=(--size 64x64 --batch 4 --steps 1)
    slower=5
fi
ways=(plain "accumulate 2" checkpoint_activations bf16-mixed)
if "$python" -c "import torchjd" 2>"$out/torchjd.log"; then
    ways+=(pcgrad)
fi

failed=0
part() { # NAME SECONDS COMMAND...: run it for so long at most, and keep what it prints
    local name="$1" seconds="$(($2 * slower))"
    shift 2
    echo "== $name"
    if ! timeout "$seconds" "$@" 2>&1 | tee "$out/$name.log"; then
        echo "== $name failed" | tee -a "$out/$name.log"
        failed=1
    fi
}
part machine 30 "$python" -c "
import torch, timm
from importlib.metadata import version
from m3vit.training.launch import Fabric
lightning = Fabric.__module__.split('.')[0]
print('torch', torch.__version__, 'timm', timm.__version__, lightning, version(lightning))
print(torch.cuda.get_device_properties(0) if torch.cuda.is_available() else 'no CUDA GPU')"
part moe 170 "$python" benchmarks/moe.py --device "$device" "${sizes[@]}" --json "$out/moe.json"
part training 110 "$python" benchmarks/training.py --device "$device" "${training[@]}" --ways "${ways[@]}" \
    --json "$out/training.json"
part tests 160 "$python" -m pytest -q -p no:cacheprovider tests/cuda
exit "$failed"
