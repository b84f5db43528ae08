#!/usr/bin/env bash
# One command of dip_jax on one machine: as one process that sees all its devices, or as several that share them.
#
# usage: bash launch/local.sh [options] COMMAND [flags of the command]
# such as: bash launch/local.sh --processes=8 train --config=configs/dip.py --workdir=runs/dip
#
#   --processes=N      1 sees every device; N > 1 gives each process one GPU (a CPU device where there is none)   (1)
#   --accelerator=A    auto|cpu|cuda|tpu; auto takes a GPU or TPU where there is one                            (auto)
#   --logs=DIR         with several processes: DIR/process-I.log, that of process 0 is shown too                (logs)
#   --dry-run          print what would be run, with the environment; here or after COMMAND
#
# PYTHON=/path/to/python uses that interpreter instead of the environment that launch/install.sh makes. Signals go to all processes.
# The exit code is 2 where one process met a mistake of the user's, otherwise that of the first process that failed.
set -euo pipefail
ROOT=$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.." && pwd)

# shellcheck source=launch/dry_run.sh
source "$ROOT/launch/dry_run.sh" "$@"
set -- "${words[@]+"${words[@]}"}"
processes=1 accelerator=auto logs=logs
fail() { echo "local.sh: $1" >&2; exit 2; }
while [ $# -gt 0 ]; do
  case "$1" in
    --processes=*) processes=${1#*=} ;;
    --accelerator=*) accelerator=${1#*=} ;;
    --logs=*) logs=${1#*=} ;;
    -h|--help) sed -n '2,14s/^# \{0,1\}//p' "${BASH_SOURCE[0]}"; exit 0 ;;
    -*) fail "unknown option '$1': see --help" ;;
    *) break ;;
  esac
  shift
done
[ $# -gt 0 ] || fail "which command? Such as: bash launch/local.sh train --config=configs/demo.py:dit --workdir=runs/demo/dit"
[[ $processes =~ ^[1-9][0-9]*$ ]] || fail "--processes=$processes must be a number from 1"

[ -n "${PYTHON:-}" ] || act bash "$ROOT/launch/install.sh" --accelerator "$accelerator"
# shellcheck source=launch/env.sh
source "$ROOT/launch/env.sh" "$accelerator"
export PYTHONPATH=$ROOT${PYTHONPATH:+:$PYTHONPATH}
program=("$PYTHON" -m dip_jax "$@")

if [ "$processes" = 1 ]; then
  [ -z "$dry_run" ] || { show "${program[@]}"; exit 0; }
  exec "${program[@]}"
fi

if [[ $JAX_PLATFORMS == cuda* ]] && [ -z "$dry_run" ] && command -v nvidia-smi >/dev/null; then
  listed=$(nvidia-smi -L 2>&1) || fail "nvidia-smi cannot count the GPUs (${listed%%$'\n'*}): mend the driver"
  gpus=$(grep -c '^GPU ' <<<"$listed") || true  # none is an answer
  [ "$processes" -le "$gpus" ] || fail "--processes=$processes, but this machine has $gpus GPUs"
fi
port=$((20000 + RANDOM % 10000))  # below the range from which the system gives out ports
export JAX_COORDINATOR_ADDRESS=127.0.0.1:$port JAX_NUM_PROCESSES=$processes
if [ -n "$dry_run" ]; then
  printf 'mkdir -p %q\n' "$logs"
  for ((i = 0; i < processes; i++)); do
    echo "$(JAX_PROCESS_ID=$i CUDA_VISIBLE_DEVICES=$i show "${program[@]}")>$(printf %q "$logs/process-$i.log") 2>&1 &"
  done
  exit 0
fi

mkdir -p "$logs"
children=()
# shellcheck disable=SC2329 # the traps call it
stop() { kill "-$1" "${children[@]}" 2>/dev/null || true; }
trap 'stop TERM' TERM USR1  # every process saves, ends with 85, and so do we
trap 'stop INT' INT
for ((i = 0; i < processes; i++)); do
  JAX_PROCESS_ID=$i CUDA_VISIBLE_DEVICES=$i "${program[@]}" >"$logs/process-$i.log" 2>&1 &
  children+=($!)
done
tail --pid="${children[0]}" -n +1 -F "$logs/process-0.log" 2>/dev/null &
shown=$!

code=0
for child in "${children[@]}"; do
  while kill -0 "$child" 2>/dev/null; do wait "$child" || true; done  # a signal to this shell ends `wait` early
  one=0
  wait "$child" || one=$?
  if [ "$code" = 0 ] || [ "$one" = 2 ]; then code=$one; fi
done
wait "$shown" || true
if [ "$code" != 0 ]; then
  echo "local.sh: ended with $code; the last lines of the processes:" >&2
  for ((i = 0; i < processes; i++)); do echo "process $i: $(tail -n 1 "$logs/process-$i.log")" >&2; done
fi
exit "$code"
