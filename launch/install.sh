#!/usr/bin/env bash
# Makes the environment in .venv that the other launchers use; does nothing where it is already right.
# usage: bash launch/install.sh [--accelerator auto|cpu|cuda|tpu] [--extra test] [--dry-run]
set -euo pipefail
ROOT=$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.." && pwd)

# shellcheck source=launch/dry_run.sh
source "$ROOT/launch/dry_run.sh" "$@"
set -- "${words[@]+"${words[@]}"}"
accelerator=auto extras=()
fail() { echo "install.sh: $1" >&2; exit 2; }
while [ $# -gt 0 ]; do
  case "$1" in --accelerator|--extra) [ $# -gt 1 ] || fail "$1 needs a value" ;; esac
  case "$1" in
    --accelerator=*) accelerator=${1#*=} ;;
    --accelerator) accelerator=$2; shift ;;
    --extra=*) extras+=("${1#*=}") ;;
    --extra) extras+=("$2"); shift ;;
    -h|--help) sed -n '2,3s/^# //p' "${BASH_SOURCE[0]}"; exit 0 ;;
    *) fail "unknown argument '$1': see --help" ;;
  esac
  shift
done

case "$accelerator" in
  auto|cuda|tpu) found=$(bash "$ROOT/launch/accelerator.sh" "$accelerator") || exit 2 ;;
  cpu) found=cpu ;;
  *) fail "--accelerator=$accelerator is unknown: it is one of auto, cpu, cuda, tpu" ;;
esac
case "$accelerator/$found" in
  auto/*|cpu/cpu|cuda/cuda|tpu/tpu) accelerator=$found ;;
  cuda/*) fail "--accelerator=cuda, but nvidia-smi lists no GPU here: use --accelerator=cpu or another machine" ;;
  tpu/*) fail "--accelerator=tpu, but there is no /dev/accel* here: use --accelerator=cpu or a TPU machine" ;;
esac
[ "$accelerator" = cpu ] || extras+=("$accelerator")

python='' others=''
for candidate in python3.12 python3.11 python3 python; do
  command -v "$candidate" >/dev/null || continue
  version=$("$candidate" -c 'import sys; print("%d.%d" % sys.version_info[:2])' 2>/dev/null) || version='does not start'
  case "$version" in
    3.11|3.12) python=$candidate; break ;;
    *) others+="${others:+, }$candidate ($version)" ;;
  esac
done
[ -n "$python" ] || fail "needs Python 3.11 or 3.12 on PATH; found ${others:-none}"

joined=$(printf '%s\n' "${extras[@]+"${extras[@]}"}" | sort -u | paste -sd, -)
package="$ROOT${joined:+[$joined]}"
stamp=$ROOT/.venv/.dip_installed
# One line per set of extras already installed from these very files.
wanted="$(cat "$ROOT/requirements.txt" "$ROOT/pyproject.toml" | cksum) ${joined:-none}"
if [ -e "$ROOT/.venv" ] && ! "$ROOT/.venv/bin/python" -c '' 2>/dev/null; then
  fail "the Python in $ROOT/.venv does not start: remove that folder and run this again"
fi
if grep -qsxF "$wanted" "$stamp"; then
  [ -z "$dry_run" ] || echo "# nothing to do: $ROOT/.venv has it all"
  exit 0
fi

# uv and pip end with 2 where the network fails, too: no mistake of the user's.
step() { act "$@" || { echo "install.sh: the installation failed, see above; run it again" >&2; exit 1; }; }
[ -n "$dry_run" ] || echo "installing into $ROOT/.venv (${joined:-no extras}); once, a minute or two" >&2
if command -v uv >/dev/null; then
  [ -e "$ROOT/.venv" ] || step uv venv --quiet --python "$python" "$ROOT/.venv"
  VIRTUAL_ENV=$ROOT/.venv step uv pip install --quiet --editable "$package"
else
  [ -x "$ROOT/.venv/bin/pip" ] || step "$python" -m venv "$ROOT/.venv"
  step "$ROOT/.venv/bin/python" -m pip install --quiet --disable-pip-version-check --no-compile --editable "$package"
fi
[ -n "$dry_run" ] || echo "$wanted" >>"$stamp"
