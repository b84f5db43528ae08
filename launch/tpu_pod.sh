#!/usr/bin/env bash
# A Cloud TPU slice from request to deletion, through `gcloud`: the same command of dip_jax on every worker.
#
# usage: bash launch/tpu_pod.sh ACTION --name=NAME --zone=ZONE [options] [COMMAND [flags of the command]]
# such as: bash launch/tpu_pod.sh up --name=dip --zone=us-east5-a --type=v5p-64 --spot \
#            train --config=configs/dip.py --workdir=gs://BUCKET/dip --config.data.path=/mnt/imagenet256
#
# actions:
#   up        create, sync, install and run until the command is done; after a preemption all of it again (it goes on where
#             it stopped, if --workdir is in a bucket). The slice stays: delete it
#   create    request the slice (a queued resource) and wait until it is there
#   sync      copy the tracked files of this checkout to every worker
#   install   make the environment on every worker
#   run       run COMMAND on every worker, with the output of all here and in dip_jax/logs/worker.log of each
#   logs      follow the log of one worker (--worker=I, 0)
#   status    the state of the request
#   delete    give the slice back
#
# options:
#   --project=P        (gcloud's own)          --type=T          accelerator type, such as v5p-64 or v6e-256    (v5p-8)
#   --spot             preemptible             --runtime=R       image, v2-alpha-tpuv6e for v6e       (v2-alpha-tpuv5)
#   --dry-run          print gcloud's calls    --accelerator=A   what the workers compute on                    (tpu)
#   --poll=SECONDS     between two looks at the state of the request                                             (30)
#
# Everything is gcloud's: queued resources, spot capacity, ssh. Close the port of JAX's coordinator to other networks.
set -euo pipefail
ROOT=$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.." && pwd)

fail() { echo "tpu_pod.sh: $1" >&2; exit 2; }
case "${1:-}" in
  -h|--help) sed -n '2,27s/^# \{0,1\}//p' "${BASH_SOURCE[0]}"; exit 0 ;;
  up|create|sync|install|run|logs|status|delete) action=$1; shift ;;
  *) fail "which action? One of up, create, sync, install, run, logs, status, delete; see --help" ;;
esac
name='' zone='' project='' type=v5p-8 runtime=v2-alpha-tpuv5 accelerator=tpu worker=0 poll=30 spot='' dry_run=''
while [ $# -gt 0 ]; do
  case "$1" in
    --name=*) name=${1#*=} ;;
    --zone=*) zone=${1#*=} ;;
    --project=*) project=${1#*=} ;;
    --type=*) type=${1#*=} ;;
    --runtime=*) runtime=${1#*=} ;;
    --accelerator=*) accelerator=${1#*=} ;;
    --worker=*) worker=${1#*=} ;;
    --poll=*) poll=${1#*=} ;;
    --spot) spot=1 ;;
    --dry-run) dry_run=1 ;;
    -h|--help) exec bash "${BASH_SOURCE[0]}" --help ;;
    -*) fail "unknown option '$1': see --help" ;;
    *) break ;;
  esac
  shift
done
[ -n "$name" ] || fail "--name is missing: name the slice, such as --name=dip"
[ -n "$zone" ] || fail "--zone is missing: where the slice is, such as --zone=us-east5-a"
case "$action" in up|run) [ $# -gt 0 ] || fail "$action needs a COMMAND, such as train --config=configs/dip.py" ;; esac
[ -n "$dry_run" ] || command -v gcloud >/dev/null || fail "gcloud is not on PATH: install the Google Cloud CLI"

place=("--zone=$zone")
[ -z "$project" ] || place+=("--project=$project")
call() {
  if [ -n "$dry_run" ]; then
    printf '%q ' gcloud compute tpus "$@"
    echo
  else
    gcloud compute tpus "$@"
  fi
}
on_workers() { call tpu-vm ssh "$name" "${place[@]}" "--worker=$1" "--command=$2"; }
state() { gcloud compute tpus queued-resources describe "$name" "${place[@]}" '--format=value(state.state)' 2>/dev/null || echo NONE; }

create() {
  local flags=("--node-id=$name" "${place[@]}" "--accelerator-type=$type" "--runtime-version=$runtime") now
  [ -z "$spot" ] || flags+=(--spot)
  if [ -n "$dry_run" ] || [ "$(state)" = NONE ]; then call queued-resources create "$name" "${flags[@]}"; fi
  [ -z "$dry_run" ] || return 0
  while now=$(state) && [ "$now" != ACTIVE ]; do
    case "$now" in
      FAILED|SUSPENDING|SUSPENDED) echo "tpu_pod.sh: the request is $now" >&2; return 1 ;;
    esac
    echo "waiting: $now" >&2
    sleep "$poll"
  done
}
delete() { call queued-resources delete "$name" "${place[@]}" --force --quiet; }

sync() {
  local archive
  archive=$(mktemp -d)
  git -C "$ROOT" ls-files -z | tar -C "$ROOT" --null -czf "$archive/dip_jax.tgz" --files-from=-
  call tpu-vm scp "$archive/dip_jax.tgz" "$name:dip_jax.tgz" "${place[@]}" --worker=all &&
    on_workers all 'mkdir -p dip_jax && tar -xzf dip_jax.tgz -C dip_jax' || { rm -r "$archive"; return 1; }
  rm -r "$archive"
}

# The images carry Python 3.10; uv brings a newer one into the home directory.
# shellcheck disable=SC2016
MAKE_ENVIRONMENT='cd dip_jax && export PATH=$HOME/.local/bin:$PATH && { [ -n "${PYTHON:-}" ] || {
  command -v python3.12 python3.11 >/dev/null || { python3 -m pip install --user --quiet uv && uv python install --quiet 3.12; }
  bash launch/install.sh --accelerator '$accelerator'; }; }'
install() { on_workers all "$MAKE_ENVIRONMENT"; }

run() {  # what a worker's command ended with stays in logs/exit
  local line
  line=$(printf '%q ' bash launch/local.sh "--accelerator=$accelerator" "$@")
  on_workers all "cd dip_jax && mkdir -p logs && rm -f logs/exit && set -o pipefail
    { $line 2>&1; echo \$? >logs/exit; } | tee -a logs/worker.log; exit \$(cat logs/exit)"
}
logs() { on_workers "$worker" 'tail -n 100 -F dip_jax/logs/worker.log'; }

up() {
  local code crashes=0
  while :; do
    code=1
    if create && sync && install; then
      if run "$@"; then return 0; fi
      [ -z "$dry_run" ] || return 0
      code=$(on_workers 0 'cat dip_jax/logs/exit' 2>/dev/null) || code=lost
    fi
    case "$(state)" in
      ACTIVE)
        case "$code" in
          2|3|86|130) echo "tpu_pod.sh: the command ended with $code: not repeated" >&2; return "$code" ;;
          85) crashes=0 ;;
          *) crashes=$((crashes + 1)); [ "$crashes" -le 3 ] || { echo "tpu_pod.sh: three failures in a row" >&2; return 1; } ;;
        esac ;;
      *)
        echo "tpu_pod.sh: preempted: asking for another slice" >&2
        crashes=0
        delete || true
        while [ "$(state)" != NONE ]; do sleep "$poll"; done ;;
    esac
  done
}

case "$action" in
  status) if [ -n "$dry_run" ]; then call queued-resources describe "$name" "${place[@]}"; else state; fi ;;
  *) "$action" "$@" ;;
esac
