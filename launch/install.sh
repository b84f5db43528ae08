#!/usr/bin/env bash
# Makes the environment in .venv that the other launchers use; does nothing where it is already right.
# usage: bash launch/install.sh [--accelerator auto|cpu|cuda|tpu] [--extra test]
set -euo pipefail
ROOT=$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.." && pwd)

accelerator=auto extras=()
fail() { echo "install.sh: $1" >&2; exit 2; }
while [ $# -gt 0 ]; do
  case "$1" in
    --accelerator=*) accelerator=${1#*=} ;;
    --accelerator) accelerator=${2:?--accelerator needs a value}; shift ;;
    --extra=*) extras+=("${1#*=}") ;;
    --extra) extras+=("${2:?--extra needs a value}"); shift ;;
    -h|--help) sed -n '2,3s/^# //p' "${BASH_SOURCE[0]}"; exit 0 ;;
    *) fail "unknown argument '$1': see --help" ;;
  esac
  shift
done

has_gpu() { command -v nvidia-smi >/dev/null && nvidia-smi -L 2>/dev/null | grep -q GPU; }
has_tpu() { compgen -G '/dev/accel*' >/dev/null || compgen -G '/dev/vfio/[0-9]*' >/dev/null; }
case "$accelerator" in
  auto) if has_gpu; then accelerator=cuda; elif has_tpu; then accelerator=tpu; else accelerator=cpu; fi ;;
  cpu) ;;
  cuda) has_gpu || fail "--accelerator=cuda, but nvidia-smi lists no GPU here: use --accelerator=cpu or another machine" ;;
  tpu) has_tpu || fail "--accelerator=tpu, but there is no /dev/accel* here: use --accelerator=cpu or a TPU machine" ;;
  *) fail "--accelerator=$accelerator is unknown: it is one of auto, cpu, cuda, tpu" ;;
esac
[ "$accelerator" = cpu ] || extras+=("$accelerator")

python=
for candidate in python3.12 python3.11 python3 python; do
  if command -v "$candidate" >/dev/null && "$candidate" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 13))' 2>/dev/null; then
    python=$candidate
    break
  fi
done
[ -n "$python" ] || fail "needs Python 3.11 or 3.12 on PATH; found $(python3 --version 2>/dev/null || echo none)"

joined=$(printf '%s\n' "${extras[@]+"${extras[@]}"}" | sort -u | paste -sd, -)
package="$ROOT${joined:+[$joined]}"
stamp=$ROOT/.venv/.dip_installed
# One line per set of extras already installed from these very files.
wanted="$(cat "$ROOT/requirements.txt" "$ROOT/pyproject.toml" | cksum) ${joined:-none}"
if [ -x "$ROOT/.venv/bin/python" ] && grep -qxF "$wanted" "$stamp" 2>/dev/null; then
  exit 0
fi

echo "installing into $ROOT/.venv (${joined:-no extras}); once, a minute or two" >&2
if command -v uv >/dev/null; then
  [ -x "$ROOT/.venv/bin/python" ] || uv venv --quiet --python "$python" "$ROOT/.venv"
  VIRTUAL_ENV=$ROOT/.venv uv pip install --quiet --editable "$package"
else
  [ -x "$ROOT/.venv/bin/pip" ] || "$python" -m venv "$ROOT/.venv"
  "$ROOT/.venv/bin/python" -m pip install --quiet --disable-pip-version-check --editable "$package"
fi
echo "$wanted" >>"$stamp"
