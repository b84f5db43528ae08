#!/usr/bin/env bash
# Data, training, sampling, evaluation and a report on ten photographs: the whole of dip_jax, on whatever this machine has.
# Run it again after an interruption, and it goes on where it stopped.
#
# usage: bash launch/demo.sh [--accelerator auto|cpu|cuda|tpu] [--workdir DIR] [--dry-run] [--config.KEY=VALUE ...]
#
#   --accelerator   what to compute on; auto takes a GPU or TPU where there is one    (auto)
#   --workdir       where checkpoints, logs and report.html go                        (runs/demo beside this folder)
#   --dry-run       print what would be run, with the environment
#   --config.*      overrides of configs/demo.py, of both its parts, such as --config.train.steps=200; head and placement
#                   are each part's own
set -euo pipefail
ROOT=$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.." && pwd)

# shellcheck source=launch/dry_run.sh
source "$ROOT/launch/dry_run.sh" "$@"
set -- "${words[@]+"${words[@]}"}"
accelerator=auto workdir=$ROOT/runs/demo train_flags=()
fail() { echo "demo.sh: $1" >&2; exit 2; }
while [ $# -gt 0 ]; do
  case "$1" in --accelerator|--workdir) [ $# -gt 1 ] || fail "$1 needs a value" ;; esac
  case "$1" in
    --accelerator=*) accelerator=${1#*=} ;;
    --accelerator) accelerator=$2; shift ;;
    --workdir=*) workdir=${1#*=} ;;
    --workdir) workdir=$2; shift ;;
    --config.model.head=*|--config.model.placement=*) fail "$1: each of the demo's two parts has its own: leave it out" ;;
    --config.*) train_flags+=("$1") ;;
    -h|--help) sed -n '2,11s/^# \{0,1\}//p' "${BASH_SOURCE[0]}"; exit 0 ;;
    *) fail "unknown argument '$1': see --help" ;;
  esac
  shift
done
workdir=$(realpath -m -- "$workdir")
dataset=$ROOT/datasets/photo_crops
if [ -e "$workdir/checkpoints" ] && [ ! -e "$workdir/dit/checkpoints" ]; then
  fail "$workdir holds a run that this demo did not begin (it has no dit/): choose another --workdir"
fi

act bash "$ROOT/launch/install.sh" --accelerator "$accelerator"
# shellcheck source=launch/env.sh
source "$ROOT/launch/env.sh" "$accelerator"
dip=(act "$ROOT/.venv/bin/python" -m dip_jax)

[ -z "$dry_run" ] || printf 'cd %q\n' "$ROOT"
cd "$ROOT"
"${dip[@]}" prepare --source=photo_crops --image_size=64 --out="$dataset"
train_flags=(--config.data.path="$dataset" --config.eval.reference="$dataset/validation" "${train_flags[@]+"${train_flags[@]}"}")
"${dip[@]}" train --config=configs/demo.py:dit --workdir="$workdir/dit" "${train_flags[@]}"
"${dip[@]}" train --config=configs/demo.py --init_from="$workdir/dit" --workdir="$workdir" "${train_flags[@]}"
"${dip[@]}" evaluate --workdir="$workdir" --quick  # without the row of the last weights, a minute
