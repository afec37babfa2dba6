#!/usr/bin/env bash
# Try every command with the lowest versions that pyproject.toml allows, in an environment of its own.
#
#     tools/lowest.sh
#
# PYTHON (python3.11, or python3) makes the environment: the lowest Python has wheels of all of them. A quarter of an
# hour on two cores.
set -euo pipefail
root=$(cd "$(dirname "$0")/.." && pwd)
python=${PYTHON:-$(command -v python3.11 || command -v python3)}

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
export PIP_DISABLE_PIP_VERSION_CHECK=1 CMPE_SE_CACHE="$work/cache" MPLCONFIGDIR="$work/matplotlib"
unset PYTHONPATH # of a checkout
"$python" -m venv "$work/lowest"
"$work/lowest/bin/pip" install --quiet uv
export VIRTUAL_ENV="$work/lowest" PATH="$work/lowest/bin:$PATH"
uv pip install --quiet --resolution lowest-direct "$root[export,report,prune,explore,tensorboard]"
python --version
uv pip list --quiet | grep -E "^(accelerate|gradio|jsonargparse|numpy|onnxscript|scipy|timm|torch|torchvision) "

mkdir "$work/empty"
cd "$work/empty"
try() { # a command, of which the last line is shown, and all where it fails
  cmpe-se "$@" >"$work/said" 2>&1 || { cat "$work/said" && exit 1; }
  echo "cmpe-se $1: $(tail -n 1 "$work/said")"
}
try train --epochs 1 --tensorboard=true --output run
try train --model resnet18 --convert folded_3x3 --epochs 1 --output converted
try evaluate run
try report run
for format in onnx openvino torch-export; do
  try export run --to "$format"
done
try freeze run --output frozen
try prune run --target-macs 0.7 --epochs 1 --output pruned
try compare --models preact_resnet20,se_preact_resnet20 --epochs 1 --seeds 2 --output comparison
try benchmark --model preact_resnet20 --repeats 3 --batch-sizes 2
try predict "$root/docs/competition.png"
cmpe-se explore run --port 7860 >"$work/said" 2>&1 &
page=$!
for ((seconds = 0; seconds < 120; seconds++)); do
  if python -c "import urllib.request; urllib.request.urlopen('http://127.0.0.1:7860')" 2>/dev/null; then break; fi
  kill -0 "$page" 2>/dev/null || { cat "$work/said" && exit 1; }
  sleep 1
done
kill -INT "$page"
[ "$seconds" -lt 120 ] || { echo "lowest.sh: explore has not opened its page in two minutes" >&2 && exit 1; }
echo "cmpe-se explore: $(tail -n 1 "$work/said")"
echo "lowest.sh: all commands work"
