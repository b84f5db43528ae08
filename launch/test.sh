#!/usr/bin/env bash
# Runs ruff and the tests in the project's own environment.
# usage: bash launch/test.sh [--slow] [--campaign] [pytest arguments]
set -euo pipefail
ROOT=$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.." && pwd)
case "${1:-}" in -h|--help) sed -n '2,3s/^# //p' "${BASH_SOURCE[0]}"; exit 0 ;; esac

bash "$ROOT/launch/install.sh" --accelerator cpu --extra test
cd "$ROOT"
.venv/bin/ruff check .
.venv/bin/ruff format --check .
exec .venv/bin/python -m pytest --numprocesses=auto "$@"
