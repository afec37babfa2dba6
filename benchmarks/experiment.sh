#!/usr/bin/env bash
# The experiment of results/experiments/cifar100-16px: one run at a time on one core, at the lowest priority.
#
#     benchmarks/experiment.sh start ARCHIVE         continue with the plan, in the background (cifar100-16px.tar.xz)
#     benchmarks/experiment.sh status                finished runs, the one under way, and what it last said
#     benchmarks/experiment.sh stop                  save a checkpoint and stop; what is finished is collected
#     benchmarks/experiment.sh pause | resume        hold the processes while something is timed, and continue
#     benchmarks/experiment.sh collect               copy the small files of finished runs into the repository
#     benchmarks/experiment.sh unpack ARCHIVE [DIR]  only make the images' folders 50k/ and 10k/
#
# It trains with a wheel of the commit in results/experiments/cifar100-16px/COMMIT, installed in an environment of its
# own, so that later work does not change what is measured. All of that lies in /tmp/cmpe-se-experiment, the same path
# on each machine, as the runs' settings name it. A machine that has nothing restores finished runs from the repository.
# For benchmarks/gpu.sh there are `plan`, which checks the plan and prints its lines, and `restore DIR`, which copies
# finished runs of the repository to DIR/COMPARISON/cells/.
# PYTHON (python3) makes the environment, CORE (the last one) is where it runs. RECORDS, EXPERIMENT_HOME,
# COLLECT_SECONDS, START_SECONDS and STOP_SECONDS are for tests.
set -euo pipefail
unset PYTHONPATH # of a developer's shell: the checkout there would run in the place of the installed commit
root=$(cd "$(dirname "$0")/.." && pwd)
script=$root/benchmarks/experiment.sh
records=${RECORDS:-$root/results/experiments/cifar100-16px}
home=${EXPERIMENT_HOME:-/tmp/cmpe-se-experiment}
data=$home/data runs=$home/runs log=$home/log pid_file=$home/pid
core=${CORE:-$(($(OMP_NUM_THREADS='' nproc) - 1))} # nproc would count the threads that a shell allows
small_files=(config.yaml metrics.jsonl result.json corruptions.json commit) # as in many_runs/table.py
usage="start ARCHIVE | status | stop | pause | resume | collect | unpack ARCHIVE [DIR]"

refuse() {
  echo "experiment.sh: $1" >&2
  exit "${2:-1}"
}

plan() { # a line each: name|images|epochs|networks|first seed|seeds|flags
  local lines line separators name images epochs models first seeds flags
  [ -f "$records/plan.txt" ] || refuse "no plan: $records/plan.txt is not there"
  lines=$(sed -E -e '/^[[:space:]]*(#|$)/d' -e 's/[[:space:]]*\|[[:space:]]*/|/g' -e 's/^[[:space:]]+|[[:space:]]+$//g' \
    "$records/plan.txt")
  [ -n "$lines" ] || refuse "$records/plan.txt has no line"
  while IFS= read -r line; do
    separators=${line//[^|]/}
    IFS='|' read -r name images epochs models first seeds flags <<<"$line"
    # A leading 0 would make a seed octal.
    [[ ${#separators} == 6 && $name =~ ^[A-Za-z0-9._-]+$ && $images =~ ^[A-Za-z0-9_-]+$ && $epochs =~ ^[1-9][0-9]*$ &&
      -n $models && $first =~ ^(0|[1-9][0-9]*)$ && $seeds =~ ^[1-9][0-9]*$ ]] ||
      refuse "plan.txt: '$line' should be name | folder of images | epochs | networks | first seed | seeds | flags"
  done <<<"$lines"
  echo "$lines"
}

running() { # not a later process with the same number
  local pid
  pid=$(cat "$pid_file" 2>/dev/null) || return 1
  [ -n "$pid" ] && kill -0 "$pid" 2>/dev/null || return 1
  [ ! -d /proc/self ] || grep -q "experiment\.sh" "/proc/$pid/cmdline" 2>/dev/null
}

install() { # a wheel of the fixed commit
  local commit
  commit=$(cat "$records/COMMIT")
  if [ "$(cat "$home/installed" 2>/dev/null)" = "$commit" ]; then return; fi
  git -C "$root" cat-file -e "$commit^{commit}" 2>/dev/null ||
    refuse "commit $commit of $records/COMMIT is not in this repository"
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

unpack() { # an archive into a folder; what is there already stays
  local archive=$1 folder=$2 class said
  if [ -f "$folder/unpacked" ]; then return; fi
  [ -f "$archive" ] || refuse "no archive '$archive': give the path of cifar100-16px.tar.xz"
  for class in 10k 50k; do
    [ ! -e "$folder/$class" ] || refuse "$folder/$class is there, perhaps half of it: remove it, or name another folder"
  done
  local part=$folder/unpacking
  rm -rf "$part"
  mkdir -p "$part/10k/train"
  said=$(tar -xf "$archive" -C "$part" 2>&1) || refuse "cannot unpack $archive: ${said##*$'\n'}"
  [ -d "$part/cifar100-16px/train" ] || refuse "$archive has no folder cifar100-16px/train"
  mv "$part/cifar100-16px" "$part/50k"
  for class in "$part"/50k/train/*; do
    mkdir "$part/10k/train/${class##*/}"
    cp "$class"/0??.png "$part/10k/train/${class##*/}/"
  done
  cp -r "$part/50k/test" "$part/10k/test"
  mv "$part/10k" "$part/50k" "$folder/"
  rm -rf "$part"
  touch "$folder/unpacked"
}

restore() { # finished runs of other machines into a folder of comparisons
  local cell place
  for cell in "$records"/cells/*/*/; do
    [ -f "$cell/result.json" ] || continue
    cell=${cell%/}
    place=$1/$(basename "$(dirname "$cell")")/cells/$(basename "$cell")
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
      # What is kept stays: a finished run does not change, and one of another machine was put here from the records.
      if [ ! -f "$cell/$file" ] || [ -f "$place/$file" ]; then continue; fi
      cp "$cell/$file" "$place/"
      case $file in *.json) sed -i "s#$home/##g" "$place/$file" ;; esac # no place of this machine
    done
    # A wheel does not know its commit.
    if [ ! -f "$place/commit" ] && [ -f "$home/installed" ] && grep -q '"commit": null' "$place/result.json"; then
      cp "$home/installed" "$place/commit"
    fi
  done
}

collect_in_between() { # a machine that is lost takes minutes with it, not a seed
  while sleep "${COLLECT_SECONDS:-300}" && kill -0 $$ 2>/dev/null; do
    collect || true
  done
}

planned() { # number of runs of the plan's line that is read
  echo $(($(tr ',' '\n' <<<"$models" | wc -l) * seeds))
}

stopping='' collector='' left_out=''

compare() { # networks with so many seeds from the first one on, of the plan's line that is read
  [ -z "$stopping" ] || return 143
  # shellcheck disable=SC2086 # several flags
  "$home/env/bin/cmpe-se" compare --models "$models" --recipe "$records/recipe.yaml" --data-dir "$data/$images" \
    --epochs "$epochs" --first-seed "$1" --seeds "$2" --jobs 1 --output "$runs/$name" $flags </dev/null
}

train() { # the whole plan, seed by seed: what is finished at any time can be compared in pairs
  local lines name images epochs models first seeds flags seed cell
  lines=$(plan)
  while IFS='|' read -r name images epochs models first seeds flags; do
    if [ ! -d "$data/$images" ]; then # as in gpu.sh, a line that cannot be trained here does not end the others
      echo "experiment.sh: $data has no $images/, which $name needs: make it as README.md says" >&2
      left_out+=" $name"
      continue
    fi
    if [ "$(finished "$runs/$name")" -ge "$(planned)" ] &&
      { [ -f "$records/$name/compare.md" ] || [ -f "$runs/$name/compare.md" ]; }; then
      echo "$name: all $(planned) runs are finished, and compared"
      continue
    fi
    for ((seed = first; seed < first + seeds; seed++)); do
      compare "$seed" 1 || return
      collect
      if [ "$seed" != "$first" ]; then # weights take room, and one seed's are enough to look at
        for cell in "$runs/$name"/cells/*-seed"$seed"/; do
          [ ! -f "$cell/result.json" ] || rm -rf "$cell/model" "$cell/state"
        done
      fi
    done
    compare "$first" "$seeds" || return # trains nothing: compare.md has all seeds
  done <<<"$lines"
}

end() { # of the background script, whatever ends it; `status` reads what it says
  local status=$? how
  trap '' TERM INT
  how="failed with status $status"
  if [ "$status" = 0 ]; then how="the plan is done${left_out:+, but for$left_out}"; elif [ -n "$stopping" ]; then how="stopped on request"; fi
  # shellcheck disable=SC2046 # several processes
  [ -z "$collector" ] || kill $(tree "$collector") 2>/dev/null || true
  collect || true
  echo "experiment.sh ended: $how"
  rm -f "$pid_file"
}

tree() { # a process and everything that it started, at any depth
  echo "$1"
  local child
  for child in $(pgrep -P "$1"); do tree "$child"; done
}

group() { tree "$(cat "$pid_file")"; }

comparisons() { pgrep -P "$1" -f "cmpe-se compare" || true; } # that the background script has started: one, or none

alive() { # those of some processes that have not ended
  local pid
  for pid in "$@"; do
    case $(ps -o stat= -p "$pid" 2>/dev/null) in '' | Z*) ;; *) echo "$pid" ;; esac
  done
}

stop() {
  local main pids compares child told=' ' left
  main=$(cat "$pid_file")
  pids=$(group)
  compares=$(comparisons "$main")
  # shellcheck disable=SC2086 # several processes
  kill -CONT $pids 2>/dev/null || true
  kill -TERM "$main" 2>/dev/null || true
  # compare tells its run once and waits until that has saved. A second signal would end either at once.
  for ((left = ${STOP_SECONDS:-120}; left > 0; left--)); do
    for child in $compares; do
      case $told in *" $child "*) continue ;; esac
      kill -TERM "$child" 2>/dev/null || true
      told+="$child "
      pids+=" $(tree "$child")"
    done
    # shellcheck disable=SC2086
    [ -n "$(alive $pids)" ] || break
    sleep 1
    compares=$(comparisons "$main") # perhaps one that began just before the signal
  done
  # shellcheck disable=SC2086
  pids=$(alive $pids)
  if [ -n "$pids" ]; then
    # shellcheck disable=SC2086
    kill -KILL $pids 2>/dev/null || true
    echo "experiment.sh ended: killed, as it had not stopped after ${STOP_SECONDS:-120} s" | tee -a "$log"
  elif [ -f "$pid_file" ]; then # an older version of this script, which says nothing itself
    echo "experiment.sh ended: stopped on request" >>"$log"
  fi
  rm -f "$pid_file"
  collect
  echo "stopped; $(finished "$runs"/*) runs are finished"
}

finished() { # number of finished runs in folders of comparisons
  local folder file count=0
  for folder in "$@"; do
    for file in "$folder"/cells/*/result.json; do
      if [ -f "$file" ]; then count=$((count + 1)); fi
    done
  done
  echo "$count"
}

state() { # of the background script, in a line
  local pid ended
  pid=$(cat "$pid_file" 2>/dev/null || true)
  if running; then
    case $(ps -o stat= -p "$pid") in T*) echo "paused (process $pid)" ;; *) echo "running (process $pid)" ;; esac
  elif [ -n "$pid" ]; then
    echo "not running: process $pid was killed, or the machine was rebooted"
  else
    ended=$(sed -n 's/^experiment.sh ended: //p' "$log" 2>/dev/null | tail -n 1 || true)
    echo "not running${ended:+: $ended}"
  fi
}

case ${1:-} in
  start)
    plan >/dev/null
    mkdir -p "$home"
    if command -v flock >/dev/null; then
      exec 9>"$home/lock"
      flock -n 9 || refuse "another start is at work"
    fi
    running && refuse "it is running already (process $(cat "$pid_file")); see: experiment.sh status"
    collect # before another commit is installed, which did not train what is finished
    install
    unpack "${2:-}" "$data"
    restore "$runs"
    export OMP_NUM_THREADS=1 MKL_NUM_THREADS=1 CMPE_SE_CACHE=$home/cache CUDA_VISIBLE_DEVICES=
    nohup setsid nice -n 19 taskset -c "$core" bash "$script" train >>"$log" 2>&1 </dev/null 9>&- &
    echo $! >"$pid_file" # each of these commands becomes the next one
    for ((left = ${START_SECONDS:-2}; left > 0; left--)); do
      sleep 1
      running || break
    done
    if ! running; then
      status=0
      wait $! || status=$?
      rm -f "$pid_file"
      tail -n 5 "$log" >&2
      [ "$status" = 0 ] || refuse "it has ended at once; above is the end of $log"
      exit 0
    fi
    echo "started; $(finished "$runs"/*) runs are finished; see: benchmarks/experiment.sh status"
    ;;
  train) # what start puts into the background
    echo $$ >"$pid_file"
    trap end EXIT
    trap 'stopping=1' TERM INT # bash waits for what it has started
    collect_in_between &
    collector=$!
    disown
    train
    ;;
  status)
    lines=$(plan)
    state
    while IFS='|' read -r name _ epochs models _ seeds _; do
      echo "$name: $(finished "$runs/$name") of $(planned) runs"
      for cell in "$runs/$name"/cells/*/; do
        if [ -d "$cell" ] && [ ! -f "$cell/result.json" ] && [ -f "$cell/metrics.jsonl" ]; then
          echo "  $(basename "$cell"): $(wc -l <"$cell/metrics.jsonl") of $epochs epochs, $(tail -n 1 "$cell/metrics.jsonl" |
            sed 's/.*"images_per_second": *\([0-9]*\).*/\1 images a second/')"
        fi
      done
    done <<<"$lines"
    if [ -f "$log" ]; then
      echo "the end of $log:"
      tail -n 5 "$log"
    fi
    ;;
  stop)
    running || refuse "it is not running"
    stop
    ;;
  pause | resume)
    running || refuse "it is not running"
    signal=STOP
    if [ "$1" = resume ]; then signal=CONT; fi
    group | xargs -r kill "-$signal"
    echo "$1: done"
    ;;
  collect) collect ;;
  unpack)
    [ -n "${2:-}" ] || refuse "usage: benchmarks/experiment.sh unpack ARCHIVE [DIR]" 2
    unpack "$2" "${3:-$data}"
    echo "${3:-$data} has 50k/ and 10k/"
    ;;
  plan) plan ;;
  restore) restore "${2:?folder}" ;;
  *) refuse "usage: benchmarks/experiment.sh $usage" 2 ;;
esac
