#!/usr/bin/env bash
# The experiment of results/experiments/cifar100-16px: one run at a time on one core, at the lowest priority.
#
#     benchmarks/experiment.sh start ARCHIVE   go on with the plan, in the background; ARCHIVE is cifar100-16px.tar.xz
#     benchmarks/experiment.sh status          finished runs, the one under way, and what it last said
#     benchmarks/experiment.sh stop            save a checkpoint and stop; what is finished is collected
#     benchmarks/experiment.sh pause | resume  hold the processes while something is timed, and let them go on
#     benchmarks/experiment.sh collect         copy the small files of finished runs into the repository
#
# It trains with a wheel of the commit in results/experiments/cifar100-16px/COMMIT, installed in an environment of its
# own, so that later work does not change what is measured. All of that lies in /tmp/cmpe-se-experiment, the same path
# on each machine, as the runs' settings name it. A machine that has nothing restores finished runs from the repository.
# PYTHON (python3) makes the environment, CORE (the last one) is where it runs; RECORDS and EXPERIMENT_HOME are for tests.
set -euo pipefail
root=$(cd "$(dirname "$0")/.." && pwd)
script=$root/benchmarks/experiment.sh
records=${RECORDS:-$root/results/experiments/cifar100-16px}
home=${EXPERIMENT_HOME:-/tmp/cmpe-se-experiment}
data=$home/data runs=$home/runs log=$home/log pid_file=$home/pid
core=${CORE:-$(($(nproc) - 1))}
small_files=(config.yaml metrics.jsonl result.json corruptions.json)

plan() { grep -v '^ *\(#\|$\)' "$records/plan.txt" | sed 's/ *| */|/g'; }

running() { [ -f "$pid_file" ] && kill -0 "$(cat "$pid_file")" 2>/dev/null; }

refuse() {
  echo "experiment.sh: $1" >&2
  exit "${2:-1}"
}

install() { # a wheel of the fixed commit
  local commit
  commit=$(cat "$records/COMMIT")
  if [ "$(cat "$home/installed" 2>/dev/null)" = "$commit" ]; then return; fi
  git -C "$root" cat-file -e "$commit^{commit}" 2>/dev/null || refuse "commit $commit of $records/COMMIT is not in this repository"
  echo "installing commit $commit in $home/env (a CUDA build of PyTorch comes with it: minutes)"
  rm -rf "$home/source" "$home/wheel"
  mkdir -p "$home/source"
  git -C "$root" archive "$commit" | tar -x -C "$home/source"
  [ -x "$home/env/bin/python" ] || "${PYTHON:-python3}" -m venv "$home/env"
  "$home/env/bin/pip" wheel --quiet --no-deps --wheel-dir "$home/wheel" "$home/source"
  "$home/env/bin/pip" install --quiet --force-reinstall --no-deps "$home"/wheel/*.whl
  "$home/env/bin/pip" install --quiet "$home"/wheel/*.whl
  echo "$commit" >"$home/installed"
}

unpack() {
  local archive=$1 class
  if [ ! -f "$data/unpacked" ]; then
    [ -f "$archive" ] || refuse "no archive '$archive': give the path of cifar100-16px.tar.xz"
    rm -rf "$data"
    mkdir -p "$data/10k/train"
    tar -xf "$archive" -C "$data"
    mv "$data/cifar100-16px" "$data/50k"
    for class in "$data"/50k/train/*; do
      mkdir "$data/10k/train/${class##*/}"
      cp "$class"/0??.png "$data/10k/train/${class##*/}/"
    done
    cp -r "$data/50k/test" "$data/10k/test"
    touch "$data/unpacked"
  fi
}

restore() { # finished runs of other machines
  local cell
  for cell in "$records"/cells/*/*/; do
    [ -f "$cell/result.json" ] || continue
    cell=${cell%/}
    local place=$runs/$(basename "$(dirname "$cell")")/cells/$(basename "$cell")
    [ -f "$place/result.json" ] || { mkdir -p "$place" && cp "$cell"/* "$place/"; }
  done
}

collect() {
  local cell place file
  for cell in "$runs"/*/cells/*/; do
    [ -f "$cell/result.json" ] || continue
    cell=${cell%/}
    place=$records/cells/$(basename "$(dirname "$(dirname "$cell")")")/$(basename "$cell")
    mkdir -p "$place"
    for file in "${small_files[@]}"; do
      if [ -f "$cell/$file" ] && ! cmp -s "$cell/$file" "$place/$file"; then cp "$cell/$file" "$place/"; fi
    done
  done
}

train() { # the whole plan, seed by seed: what is finished at any time can be compared in pairs
  local name images epochs models first seeds flags seed cell
  while IFS='|' read -r name images epochs models first seeds flags; do
    for ((seed = first; seed < first + seeds; seed++)); do
      # shellcheck disable=SC2086 # several flags
      "$home/env/bin/cmpe-se" compare --models "$models" --recipe "$records/recipe.yaml" --data-dir "$data/$images" \
        --epochs "$epochs" --first-seed "$seed" --seeds 1 --jobs 1 --output "$runs/$name" $flags </dev/null || return
      collect
      if [ "$seed" != "$first" ]; then # weights take room, and one seed's are enough to look at
        for cell in "$runs/$name"/cells/*-seed"$seed"/; do
          [ ! -f "$cell/result.json" ] || rm -rf "$cell/model" "$cell/state"
        done
      fi
    done
  done < <(plan)
  echo "the plan is done"
}

tree() { # a process and everything that it started, at any depth
  echo "$1"
  local child
  for child in $(pgrep -P "$1"); do tree "$child"; done
}

group() { tree "$(cat "$pid_file")"; }

finished() { find "$runs" -mindepth 4 -name result.json 2>/dev/null | wc -l; }

case ${1:-} in
  start)
    running && refuse "it is running already (process $(cat "$pid_file")); see: experiment.sh status"
    mkdir -p "$home"
    install
    unpack "${2:-}"
    restore
    export OMP_NUM_THREADS=1 MKL_NUM_THREADS=1 CMPE_SE_CACHE=$home/cache CUDA_VISIBLE_DEVICES=
    nohup setsid nice -n 19 taskset -c "$core" bash "$script" train >>"$log" 2>&1 </dev/null &
    sleep 1
    echo "started; $(finished) runs are finished; see: benchmarks/experiment.sh status"
    ;;
  train) # what start puts into the background
    echo $$ >"$pid_file"
    trap collect EXIT
    train
    ;;
  status)
    running && echo "running (process $(cat "$pid_file"))" || echo "not running"
    while IFS='|' read -r name _ epochs models _ seeds _; do
      networks=$(tr ',' '\n' <<<"$models" | wc -l)
      done_cells=$(find "$runs/$name" -mindepth 3 -name result.json 2>/dev/null | wc -l)
      echo "$name: $done_cells of $((networks * seeds)) runs"
      for cell in "$runs/$name"/cells/*/; do
        if [ -d "$cell" ] && [ ! -f "$cell/result.json" ] && [ -f "$cell/metrics.jsonl" ]; then
          echo "  $(basename "$cell"): $(wc -l <"$cell/metrics.jsonl") of $epochs epochs, $(tail -n 1 "$cell/metrics.jsonl" |
            sed 's/.*"images_per_second": *\([0-9]*\).*/\1 images a second/')"
        fi
      done
    done < <(plan)
    [ ! -f "$log" ] || tail -n 3 "$log"
    ;;
  stop)
    running || refuse "it is not running"
    group | xargs -r kill -CONT 2>/dev/null || true
    group | xargs -r kill -INT 2>/dev/null || true # the runs save a checkpoint
    for _ in $(seq 60); do running || break; sleep 1; done
    if running; then group | xargs -r kill -KILL; fi
    collect
    echo "stopped; $(finished) runs are finished"
    ;;
  pause | resume)
    running || refuse "it is not running"
    signal=STOP
    if [ "$1" = resume ]; then signal=CONT; fi
    group | xargs -r kill "-$signal"
    echo "$1: done"
    ;;
  collect) collect ;;
  *) refuse "usage: benchmarks/experiment.sh start ARCHIVE | status | stop | pause | resume | collect" 2 ;;
esac
