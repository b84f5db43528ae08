#!/usr/bin/env bash
# Runs ruff and the tests in the project's own environment.
# usage: bash launch/test.sh [--slow] [--campaign] [--dry-run] [pytest arguments]
set -euo pipefail
ROOT=$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.." && pwd)
case "${1:-}" in -h|--help) sed -n '2,3s/^# //p' "${BASH_SOURCE[0]}"; exit 0 ;; esac
# shellcheck source=launch/dry_run.sh
source "$ROOT/launch/dry_run.sh" "$@"

act bash "$ROOT/launch/install.sh" --accelerator cpu --extra test
[ -z "$dry_run" ] || printf 'cd %q\n' "$ROOT"
cd "$ROOT"
act .venv/bin/ruff check .
act .venv/bin/ruff format --check .
act exec .venv/bin/python -m pytest --numprocesses=auto "${words[@]+"${words[@]}"}"
