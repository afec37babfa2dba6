#!/usr/bin/env bash
# Build the distributions, check them, and run the demo from the wheel in a clean environment. Uploads nothing.
#
#     tools/release.sh
#
# EPOCHS (2) are those of the demo, PYTHON (python3) makes the environments. PIP_ARGUMENTS are for installing the wheel.
set -euo pipefail
root=$(cd "$(dirname "$0")/.." && pwd)
cd "$root"
epochs=${EPOCHS:-2} python=${PYTHON:-python3}

if [ -n "$(git status --porcelain)" ]; then
  echo "release.sh: the working tree has changes; commit them, so that the release is what the tag says" >&2
  exit 1
fi

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
export PIP_DISABLE_PIP_VERSION_CHECK=1
unset PYTHONPATH # the wheel is what has to work, not the checkout

"$python" -m venv "$work/tools"
"$work/tools/bin/pip" install --quiet build twine
rm -rf dist
"$work/tools/bin/python" -m build --outdir dist
"$work/tools/bin/twine" check --strict dist/*

"$python" -m venv "$work/clean"
wheel=$(ls dist/*.whl)
# shellcheck disable=SC2086 # several arguments
"$work/clean/bin/pip" install --quiet ${PIP_ARGUMENTS:-} "$wheel[train]"
mkdir "$work/empty"
cd "$work/empty"
run=runs/cmpe_se_preact_resnet20-digits-seed0
"$work/clean/bin/cmpe-se" --version
"$work/clean/bin/cmpe-se" train --epochs "$epochs"
"$work/clean/bin/python" -c "
import sklearn.datasets
from PIL import Image
Image.fromarray((sklearn.datasets.load_digits().images[0] * 255 / 16).astype('uint8')).save('digit.png')"
"$work/clean/bin/cmpe-se" predict "$run" digit.png
# What comes in the wheel: networks that need neither a run nor the internet.
export HF_HUB_OFFLINE=1
"$work/clean/bin/cmpe-se" predict digit.png
"$work/clean/bin/python" -c "
import timm, cmpe_se
from cmpe_se.shipped import shipped_names
for name in shipped_names():
    print(name, timm.create_model(name, pretrained=True).pretrained_cfg['description'])"
echo "release.sh: $(basename "$wheel") is good; the upload: twine upload dist/*"
