#!/usr/bin/env bash
# The numbers of docs/performance.md that need a GPU: one of them, in one call of less than ten minutes.
# usage: bash benchmarks/gpu.sh head|step|sample|levers|start|heads|scaling|data [flags of that benchmark]
#
#   head       DiP-XL's head, 64 images: naive, folded, dense up to 4x4 (the measurement behind folding.DENSE_SIDE)
#   step       DiP-XL/16, 256 px: train step, batch 128 and 256, with and without head, remat, cuDNN, scan
#   sample     DiP-XL/16, 256 px: latency at batch 1, throughput at 8 to 256
#   levers     DiP-XL/16, 256 px, batch 1: what is made ahead of the first step and weights converted once, without and with
#   start      DiP-XL/16, 256 px: from a new process to the first sample, cold, from the cache, from an executable
#   heads      Table 2: every head against none
#   scaling    DiP-B: time against tokens, batch, depth
#   data       DiP-XL/16, 256 px, batch 128: a step's time with originals, TIFF and raw crops against a constant batch
# Results: benchmarks/results/NAME_DEVICE.json. Try XLA's flags in the environment: they are recorded with the numbers, such as
#   XLA_FLAGS=--xla_gpu_enable_command_buffer= bash benchmarks/gpu.sh sample --variants="b1:batch=1,scan_layers=False" --out=...
set -euo pipefail
ROOT=$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.." && pwd)
case "${1:-}" in -h|--help|'') sed -n '2,14s/^# \{0,1\}//p' "${BASH_SOURCE[0]}"; exit 0 ;; esac
# shellcheck source=launch/env.sh
source "$ROOT/launch/env.sh" cuda
unset JAX_COMPILATION_CACHE_DIR # compile times are part of what is measured
cd "$ROOT"
python=${PYTHON:-$ROOT/.venv/bin/python} what=$1
shift
case "$what" in
  head) exec "$python" benchmarks/head.py --batch=64 --dtype=bfloat16 --rounds=20 "$@" ;;
  step) exec "$python" benchmarks/step.py --gpu --rounds=10 "$@" ;;
  sample) exec "$python" benchmarks/sample.py --gpu --rounds=3 "$@" ;;
  levers) exec "$python" benchmarks/sample_levers.py --size=XL --steps=100 --dtype=bfloat16 --rounds=5 "$@" ;;
  start) exec "$python" benchmarks/start.py --size=XL --steps=100 --dtype=bfloat16 --rounds=1 "$@" ;;
  heads) exec "$python" benchmarks/heads_cost.py --batch=32 --rounds=10 "$@" ;;
  scaling) exec "$python" benchmarks/scaling.py --gpu --rounds=10 "$@" ;;
  data) exec "$python" benchmarks/data.py --what=step --config=configs/table1_160_epochs.py --batch=128 "$@" ;;
  *) echo "gpu.sh: '$what' is unknown: it is one of head, step, sample, levers, start, heads, scaling, data" >&2; exit 2 ;;
esac
