#!/usr/bin/env bash
# What a GPU makes affordable, in parts of at most nine minutes each, on a machine that need not reach the internet.
#
#     benchmarks/gpu.sh PART DATA OUTPUT [more flags of the part's command]
#
#     tests       the tests that need CUDA; DATA is not read
#     experiment  small networks by the hundred: python -m benchmarks.many_runs. Without --models, what the plan of
#                 results/experiments/cifar100-16px still asks for, line after line: DATA is cifar100-16px.tar.xz, or
#                 a folder with the plan's folders of images; OUTPUT/COMPARISON.tar.gz has a line's files
#     benchmark   what attention costs in ResNet-50 at 224 pixels and in ResNet-164: `cmpe-se benchmark`; DATA is not read
#     wrn         WRN-16-4 with every view of the paper, in bfloat16 and compiled: `cmpe-se compare`
#
# Else DATA has class folders (train/<class>/, test/<class>/); for torchvision's files add --data=cifar10. The package
# is taken from src/, installed or not. experiment and wrn continue where they were stopped. A part's table is what it
# prints last, and benchmark packs its files into benchmark.tar.gz. PYTHON, SECONDS_LEFT, PATIENCE (seconds without an
# epoch after which runs side by side are given up and go on one at a time), and for benchmark TURNS, BATCH, SIDE,
# SMALL_BATCH, ENGINES, MODES and CONTENDERS, can be set from outside; RECORDS and EXPERIMENT_HOME are for tests.
set -uo pipefail
usage="usage: benchmarks/gpu.sh tests|experiment|benchmark|wrn DATA OUTPUT [flags]"
part=${1:?$usage} data=${2:?$usage} output=${3:?$usage}
shift 3
python=${PYTHON:-python3}
root=$(cd "$(dirname "$0")/.." && pwd)
mkdir -p "$output"
data=$(realpath -m "$data") output=$(realpath "$output")
records=$(realpath -m "${RECORDS:-$root/results/experiments/cifar100-16px}")
home=$(realpath -m "${EXPERIMENT_HOME:-/tmp/cmpe-se-experiment}")
export RECORDS=$records EXPERIMENT_HOME=$home
cd "$root"
export PYTHONPATH="$root/src${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1

# Nine minutes for the whole part, less what has gone by.
left() { echo $((${SECONDS_LEFT:-540} - SECONDS)); }

limit() {
  local seconds
  seconds=$(left)
  if [ "$seconds" -lt 1 ]; then # to timeout, 0 is no limit
    echo "gpu.sh: the time is up" >&2
    return 124
  fi
  timeout --signal=INT --kill-after=20 "$seconds" "$@"
}

many_runs() { # which ends by itself half a minute before it would be ended
  local seconds=$(($(left) - 30)) status=0
  [ "$seconds" -ge 0 ] || seconds=0
  limit "$python" -m benchmarks.many_runs --minutes="$((seconds / 60)).$(printf %02d $((seconds % 60 * 100 / 60)))" \
    --patience="${PATIENCE:-60}" "$@" || status=$?
  if [ "$status" = 75 ] && [ "$(left)" -gt 30 ]; then # stuck: runs one at a time cannot wait for each other
    many_runs "$@" --lanes=1
    return
  fi
  return "$status"
}

train_plan() { # what the repository has is not trained again; a line that fails does not end the others
  local lines name images epochs models first seeds flags networks count status worst=0
  lines=$(bash benchmarks/experiment.sh plan) || return
  if [ -f "$data" ]; then
    bash benchmarks/experiment.sh unpack "$data" || return
    data=$home/data
  fi
  bash benchmarks/experiment.sh restore "$output" || return
  while IFS='|' read -r name images epochs models first seeds flags; do
    networks=$(tr ',' '\n' <<<"$models" | wc -l)
    count=$(find "$records/cells/$name" -mindepth 2 -maxdepth 2 -name result.json 2>/dev/null | wc -l)
    echo "$name: $count of $((networks * seeds)) runs are in the repository"
    if [ "$count" -ge $((networks * seeds)) ]; then continue; fi
    if [ ! -d "$data/$images" ]; then
      echo "gpu.sh: $data has no $images/, which $name needs: give its folder, or for 10k and 50k cifar100-16px.tar.xz" >&2
      worst=1
      continue
    fi
    if [ "$(left)" -le 30 ]; then
      echo "gpu.sh: the time is up before $name" >&2
      return 124
    fi
    # shellcheck disable=SC2086 # several flags
    many_runs --models "$models" --recipe "${records#"$root"/}/recipe.yaml" --data-dir "$data/$images" --epochs="$epochs" \
      --first-seed "$first" --seeds "$seeds" --recorded-data-dir "$home/data/$images" --output "$output/$name" \
      $flags "$@" </dev/null
    status=$?
    if [ "$status" != 0 ]; then
      worst=$status
      echo "gpu.sh: $name ended with status $status" >&2
    fi
    [ ! -f "$output/$name/cells.tar.gz" ] || cp "$output/$name/cells.tar.gz" "$output/$name.tar.gz"
  done <<<"$lines"
  return "$worst"
}

case $part in
  tests)
    # Without the options of pyproject.toml: workers would share the GPU, and pytest-xdist may not be there.
    limit "$python" -m pytest -o addopts="-ra --strict-markers" tests/gpu -q -p no:cacheprovider --durations=5 "$@" 2>&1 | tee "$output/tests.log"
    ;;
  experiment)
    case " $* " in
      *" --models"[\ =]*) many_runs --data=folder --data-dir "$data" --output "$output" "$@" ;;
      *) train_plan "$@" ;;
    esac
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
        measure resnet50 --batch-sizes "${BATCH:-128}" --image-size "${SIDE:-224}" --dtypes bfloat16 "${how[@]}" "$@"
        measure preact_resnet164 --batch-sizes "${SMALL_BATCH:-128}" "${how[@]}" "$@"
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
