#!/usr/bin/env bash
# The numbers of docs/performance.md that need a TPU: one of them, in one call of less than ten minutes, on one chip.
# usage: bash benchmarks/tpu.sh head|step|sample|levers|start|heads|scaling|data [flags of that benchmark]
#
#   head       DiP-XL's head, 64 images: naive, folded, dense up to 4x4 (the measurement behind folding.DENSE_SIDE)
#   step       DiP-XL/16, 256 px: train step, batch 32 and 64, with and without head, remat, scan (v5p, v6e: the state needs 10 GB)
#   sample     DiP-XL/16, 256 px: latency at batch 1, throughput at 8 to 256
#   levers     DiP-XL/16, 256 px, batch 1: what is made ahead of the first step and weights converted once, without and with
#   start      DiP-XL/16, 256 px: from a new process to the first sample, cold, from the cache, from an executable
#   heads      Table 2: every head against none
#   scaling    DiP-B: time against tokens, batch, depth
#   data       DiP-XL/16, 256 px, batch 32: a step's time with originals, TIFF and raw crops against a constant batch
# Results: benchmarks/results/NAME_DEVICE.json.
# Try libtpu's flags in the environment (LIBTPU_INIT_ARGS): they are recorded with the numbers.
set -euo pipefail
ROOT=$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.." && pwd)
case "${1:-}" in -h|--help|'') sed -n '2,15s/^# \{0,1\}//p' "${BASH_SOURCE[0]}"; exit 0 ;; esac
# shellcheck source=launch/env.sh
source "$ROOT/launch/env.sh" tpu
unset JAX_COMPILATION_CACHE_DIR # compile times are part of what is measured
cd "$ROOT"
python=${PYTHON:-$ROOT/.venv/bin/python} what=$1
shift
steps="base:batch=32;no_head:batch=32,head=none;head_kept:batch=32,head_remat=False;big:batch=64;full:batch=32,remat=full"
draws="b1_scan:batch=1;b64:batch=64;b1:batch=1,scan_layers=False;b64_no_head:batch=64,head=none;b8:batch=8;b256:batch=256"
case "$what" in
  head) exec "$python" benchmarks/head.py --batch=64 --dtype=bfloat16 --rounds=20 "$@" ;;
  step) exec "$python" benchmarks/step.py --gpu --variants="$steps" --rounds=10 "$@" ;;
  sample) exec "$python" benchmarks/sample.py --gpu --variants="$draws" --rounds=3 "$@" ;;
  levers) exec "$python" benchmarks/sample_levers.py --size=XL --steps=100 --dtype=bfloat16 --rounds=5 "$@" ;;
  start) exec "$python" benchmarks/start.py --size=XL --steps=100 --dtype=bfloat16 --rounds=1 "$@" ;;
  heads) exec "$python" benchmarks/heads_cost.py --batch=32 --rounds=10 "$@" ;;
  scaling) exec "$python" benchmarks/scaling.py --gpu --rounds=10 "$@" ;;
  data) exec "$python" benchmarks/data.py --what=step --config=configs/table1_160_epochs.py --batch=32 "$@" ;;
  *) echo "tpu.sh: '$what' is unknown: it is one of head, step, sample, levers, start, heads, scaling, data" >&2; exit 2 ;;
esac
