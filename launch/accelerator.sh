#!/usr/bin/env bash
# Prints which accelerator this machine has: cuda, tpu or cpu. A tool that fails is no answer: then one line, and exit code 2.
# usage: bash launch/accelerator.sh [auto|cuda|tpu]      tpu: NVIDIA's tool is not asked
set -euo pipefail
case "${1:-}" in -h|--help) sed -n '2,3s/^# //p' "${BASH_SOURCE[0]}"; exit 0 ;; esac

if [ "${1:-auto}" = tpu ]; then
  :
elif command -v nvidia-smi >/dev/null; then
  code=0
  said=$(nvidia-smi -L 2>&1) || code=$?
  if [ "$code" = 0 ]; then
    if grep -q '^GPU ' <<<"$said"; then echo cuda; exit 0; fi
  # 6: no device. 9: no driver, which is right for a tool on a machine without a card (NVIDIA is vendor 0x10de on its bus).
  elif [ "$code" != 6 ] && { [ "$code" != 9 ] || grep -qs 0x10de /sys/bus/pci/devices/*/vendor; }; then
    echo "accelerator.sh: nvidia-smi ends with $code (${said%%$'\n'*}): mend the driver, or choose with --accelerator=cpu" >&2
    exit 2
  fi
elif compgen -G '/dev/nvidia[0-9]*' >/dev/null; then  # a container that was given the devices without the tool
  echo cuda
  exit 0
fi
if compgen -G '/dev/accel*' >/dev/null || compgen -G '/dev/vfio/[0-9]*' >/dev/null; then echo tpu; else echo cpu; fi
