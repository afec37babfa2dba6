#!/usr/bin/env bash
# What a GPU makes affordable, in parts of at most nine minutes each, on a machine that need not reach the internet.
#
#     benchmarks/gpu.sh PART DATA OUTPUT [more flags of the part's command]
#
#     tests       the tests that need CUDA; DATA is not read
#     experiment  small networks by the hundred: python -m benchmarks.many_runs, whose --models has to be given
#     benchmark   what attention costs in ResNet-50 at 224 pixels and in ResNet-164: `cmpe-se benchmark`; DATA is not read
#     wrn         WRN-16-4 with every view of the paper, in bfloat16 and compiled: `cmpe-se compare`
#
# DATA has class folders (train/<class>/, test/<class>/); for torchvision's files add --data=cifar10. The package is
# taken from src/, installed or not. experiment and wrn go on where they were stopped. A part's table is what it prints
# last, and benchmark packs its files into benchmark.tar.gz. PYTHON, SECONDS_LEFT, and for benchmark TURNS, BATCH, SIDE, SMALL_BATCH,
# ENGINES, MODES and CONTENDERS, can be set from outside.
set -uo pipefail
usage="usage: benchmarks/gpu.sh tests|experiment|benchmark|wrn DATA OUTPUT [flags]"
part=${1:?$usage} data=${2:?$usage} output=${3:?$usage}
shift 3
python=${PYTHON:-python3}
root=$(cd "$(dirname "$0")/.." && pwd)
mkdir -p "$output"
data=$(realpath -m "$data") output=$(realpath "$output")
cd "$root"
export PYTHONPATH="$root/src${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1

# Nine minutes for the whole part, less what has gone by.
limit() { timeout --signal=INT --kill-after=20 $((${SECONDS_LEFT:-540} - SECONDS)) "$@"; }

case $part in
  tests)
    limit "$python" -m pytest tests/gpu -q -p no:cacheprovider --durations=5 "$@" 2>&1 | tee "$output/tests.log"
    ;;
  experiment)
    limit "$python" -m benchmarks.many_runs --minutes=8.5 --data=folder --data-dir "$data" --output "$output" "$@"
    ;;
  benchmark)
    # A command for each engine, mode and network, the quick ones first: what is not done in time is named and left out.
    log=$output/benchmark.log
    : >"$log"
    measure() {
      limit "$python" -m cmpe_se benchmark --model "$@" --contenders "${CONTENDERS:-timm_se,folded_3x3,static}" \
        --repeats "${TURNS:-30}" >>"$log" || echo "not measured: $*" >>"$log"
    }
    for engine in ${ENGINES:-eager cudagraphs compiled}; do
      for mode in ${MODES:-forward training}; do
        how=(--engines "$engine" --modes "$mode" --output "$output/$mode")
        measure resnet50 --batch-size "${BATCH:-128}" --image-size "${SIDE:-224}" --dtypes bfloat16 "${how[@]}" "$@"
        measure preact_resnet164 --batch-size "${SMALL_BATCH:-128}" "${how[@]}" "$@"
      done
    done
    tar -czf "$output/benchmark.tar.gz" -C "$output" $(cd "$output" && ls */*.csv */*.png)
    cat "$log"
    ! grep -q "^not measured" "$log"
    ;;
  wrn)
    network=wrn16_4
    limit "$python" -m cmpe_se compare --models "$network,se_$network,cmpe_se_$network" \
      --views double_fc,pair_view_2x1,pair_view_1x1,folded_3x3 --recipe cifar-fast --data=folder --data-dir "$data" \
      --precision=bfloat16 --compile=true --output "$output" "$@"
    ;;
  *)
    echo "$usage" >&2
    exit 2
    ;;
esac
