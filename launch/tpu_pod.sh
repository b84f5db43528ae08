#!/usr/bin/env bash
# A Cloud TPU slice from request to deletion, through `gcloud`: the same command of dip_jax on every worker.
#
# usage: bash launch/tpu_pod.sh ACTION --name=NAME --zone=ZONE [options] [COMMAND [flags of the command]]
# such as: bash launch/tpu_pod.sh up --name=dip --zone=us-east5-a --type=v5p-64 --spot \
#            train --config=configs/dip.py --workdir=gs://BUCKET/dip --config.data.path=/mnt/imagenet256
#
# actions:
#   up        create, sync, install and run until the command is done; after a preemption all of it again (it goes on where
#             it stopped, if --workdir is in a bucket). The slice stays: delete it. Nothing is deleted here that was not seen to
#             be preempted or refused: where gcloud gives no answer (network, login), it is asked again, and then this ends
#   create    request the slice (a queued resource) and wait until it is there
#   sync      copy the tracked files of this checkout to every worker
#   install   make the environment on every worker
#   run       run COMMAND on every worker, with the output of all here and in dip_jax/logs/worker.log of each. It goes on
#             where the connection is lost, which is then made again; Ctrl-C tells it to stop and waits until it has saved
#   logs      follow the log of one worker (--worker=I, 0)
#   status    the state of the request
#   delete    give the slice back
#
# options:
#   --project=P        (gcloud's own)          --type=T          accelerator type, such as v5p-64 or v6e-256    (v5p-8)
#   --spot             preemptible             --runtime=R       image, v2-alpha-tpuv6e for v6e       (v2-alpha-tpuv5)
#   --dry-run          print gcloud's calls    --accelerator=A   what the workers compute on                    (tpu)
#   --poll=SECONDS     between two looks at the state of the request; the first pause after what failed          (30)
#
# Everything is gcloud's: queued resources, spot capacity, ssh. Close the port of JAX's coordinator to other networks.
set -euo pipefail
ROOT=$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.." && pwd)

fail() { echo "tpu_pod.sh: $1" >&2; exit 2; }
# shellcheck source=launch/dry_run.sh
source "$ROOT/launch/dry_run.sh" "$@"
set -- "${words[@]+"${words[@]}"}"
# shellcheck source=launch/patience.sh
source "$ROOT/launch/patience.sh"
case "${1:-}" in
  -h|--help) sed -n '2,30s/^# \{0,1\}//p' "${BASH_SOURCE[0]}"; exit 0 ;;
  up|create|sync|install|run|logs|status|delete) action=$1; shift ;;
  *) fail "which action? One of up, create, sync, install, run, logs, status, delete; see --help" ;;
esac
name='' zone='' project='' type=v5p-8 runtime=v2-alpha-tpuv5 accelerator=tpu worker=0 poll=30 spot=''
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
    -h|--help) exec bash "${BASH_SOURCE[0]}" --help ;;
    -*) fail "unknown option '$1': see --help" ;;
    *) break ;;
  esac
  shift
done
[ -n "$name" ] || fail "--name is missing: name the slice, such as --name=dip"
[ -n "$zone" ] || fail "--zone is missing: where the slice is, such as --zone=us-east5-a"
[[ $poll =~ ^(0|[1-9][0-9]*)$ ]] || fail "--poll=$poll must be a number of seconds"
case "$action" in up|run) [ $# -gt 0 ] || fail "$action needs a COMMAND, such as train --config=configs/dip.py" ;; esac
[ -n "$dry_run" ] || command -v gcloud >/dev/null || fail "gcloud is not on PATH: install the Google Cloud CLI"

place=("--zone=$zone")
[ -z "$project" ] || place+=("--project=$project")
call() { act gcloud compute tpus "$@"; }
say() { echo "tpu_pod.sh: $1" >&2; }
on_workers() { call tpu-vm ssh "$name" "${place[@]}" "--worker=$1" "--command=$2"; }

# The state of the request, NONE where gcloud says that there is none of this name. Any other failure is no answer.
state() {
  local answer error tries=0
  while :; do
    if answer=$(gcloud compute tpus queued-resources describe "$name" "${place[@]}" '--format=value(state.state)' 2>&1); then
      grep -m 1 -xE '[A-Z_]+' <<<"$answer" && return 0
    elif [[ $answer =~ NOT_FOUND.*queuedResources/$name([^a-z0-9-]|$) ]]; then
      echo NONE
      return 0
    fi
    error=$(grep -m 1 ERROR <<<"$answer") || error=${answer:-nothing}
    again $((++tries)) "the state of $name is unknown, gcloud says: $error" || return 1
  done
}

# Return codes beside those of commands: the request has no machines any more, or never will; there is no answer.
gone=4 unknown=5
create() {
  local flags=("--node-id=$name" "${place[@]}" "--accelerator-type=$type" "--runtime-version=$runtime") now asked='' tries=0
  [ -z "$spot" ] || flags+=(--spot)
  [ -z "$dry_run" ] || { call queued-resources create "$name" "${flags[@]}"; return 0; }
  while now=$(state); do
    case "$now" in
      ACTIVE) return 0 ;;
      NONE)  # also after a try that failed: it may have been heard all the same
        [ -z "$asked" ] || { say "somebody deleted $name: not asked for again"; return 1; }
        if call queued-resources create "$name" "${flags[@]}"; then
          asked=1
        else
          again $((++tries)) "gcloud refuses to create $name" || return 1
        fi
        continue ;;
      FAILED|SUSPENDING|SUSPENDED) say "the request is $now"; return "$gone" ;;
      DELETING) ;;
      *) asked=1 ;;
    esac
    echo "waiting: $now" >&2
    sleep "$poll"
  done
  return 1
}
delete() { call queued-resources delete "$name" "${place[@]}" --force --quiet; }

sync() {
  local archive=TEMPORARY code=0
  [ -n "$dry_run" ] || archive=$(mktemp -d) || return 2
  pack "$archive/dip_jax.tgz" && on_slice send "$archive/dip_jax.tgz" || code=$?
  [ -n "$dry_run" ] || rm -r "$archive"
  return "$code"
}
pack() {
  if [ -n "$dry_run" ]; then
    printf 'git -C %q ls-files -z | tar -C %q --null -czf %q --files-from=-\n' "$ROOT" "$ROOT" "$1"
  else
    git -C "$ROOT" ls-files -z | tar -C "$ROOT" --null -czf "$1" --files-from=- || { say "the checkout cannot be packed"; return 2; }
  fi
}
send() {
  call tpu-vm scp "$1" "$name:dip_jax.tgz" "${place[@]}" --worker=all &&
    on_workers all 'mkdir -p dip_jax && tar -xzf dip_jax.tgz -C dip_jax'
}

# usage: on_slice STEP [arguments]: a step on the workers, again where it fails as long as the slice is there. 2 is a mistake.
on_slice() {
  local code tries=0 now
  while :; do
    code=0
    "$@" || code=$?
    case "$code" in 0|2) return "$code" ;; esac
    now=$(state) || return 1
    [ "$now" = ACTIVE ] || { say "the request is $now"; return "$gone"; }
    again $((++tries)) "$1: the workers do not answer, or fail, with $code" || return 1
  done
}

# The images carry Python 3.10; uv brings a newer one into the home directory.
# shellcheck disable=SC2016
MAKE_ENVIRONMENT='cd dip_jax && export PATH=$HOME/.local/bin:$PATH && { [ -n "${PYTHON:-}" ] || {
  command -v python3.12 python3.11 >/dev/null ||
    { python3 -m pip install --user --quiet uv && uv python install --quiet 3.12; } || exit 1  # no network, which is no mistake (2)
  bash launch/install.sh --accelerator '$accelerator'; }; }'
make_environment() { on_workers all "$MAKE_ENVIRONMENT"; }
install() { on_slice make_environment; }

# The command runs apart from the connection that started it: a lost one ends nothing. One for the same start finds it and follows
# its log, also where gcloud itself repeats what it lost; one for a new start takes the same command over where that still runs.
# logs/start: which start, boot (process numbers begin anew) and command; logs/exit: what it ended with.
# shellcheck disable=SC2016
START_OR_FOLLOW='cd dip_jax && mkdir -p logs && touch logs/worker.log || exit 1
was=$(cat logs/start 2>/dev/null) this="$(cat /proc/sys/kernel/random/boot_id) $line" from=-n10
if [ "${was#* }" != "$this" ] || { [ "${was%% *}" != "$start" ] && ! kill -0 "$(cat logs/process)" 2>/dev/null; }; then
  from=-c+$(($(wc -c <logs/worker.log) + 1))
  rm -f logs/exit
  set -m
  { trap : TERM; eval "$line"; echo $? >logs/exit.new; mv logs/exit.new logs/exit; } </dev/null >>logs/worker.log 2>&1 &
  echo $! >logs/process
  set +m
fi
echo "$start $this" >logs/start
tail -s 0.2 --pid="$(cat logs/process)" "$from" -F logs/worker.log 2>/dev/null
[ -f logs/exit ] || echo 1 >logs/exit  # killed, with the shell that would have said so
exit "$(cat logs/exit)"'

run() {
  local code=0
  [ -z "$dry_run" ] || on_a_worker "$@"
  trap 'stopped=1; on_workers all "kill -TERM -- -\$(cat dip_jax/logs/process)"' INT
  to_the_end "$@" || code=$?
  trap - INT
  [ -z "$dry_run" ] || return 0
  return "$code"
}
starts=0
to_the_end() {  # what the command of worker 0 ended with; $gone and $unknown, where nobody says
  local line start began tries=0 code now
  start=$(date +%s)-$$-$((++starts))  # two may begin in one second
  line=$(printf '%q ' bash launch/local.sh "--accelerator=$accelerator" "$@")
  while :; do
    began=$SECONDS
    if on_workers all "$(printf 'line=%q start=%q' "$line" "$start")"$'\n'"$START_OR_FOLLOW"; then return 0; fi
    # Where worker 0 is done, gcloud failed for another worker, or in the connection.
    if code=$(ended 0) && { [ "$code" != 0 ] || code=$(ended all); }; then return "$code"; fi
    now=$(state) || return "$unknown"
    [ "$now" = ACTIVE ] || return "$gone"
    [ $((SECONDS - began)) -lt 600 ] || tries=0  # it was followed for a while
    again $((++tries)) "the connection to the command is lost" || break
  done
  say "the command may still run: the same action with the same command goes on with it"
  return "$unknown"
}
ended() {  # what the command of this start ended with on worker $1, or the largest of all; false where that is not known
  local said
  said=$(on_workers "$1" "grep -qs '^$start ' dip_jax/logs/start && cat dip_jax/logs/exit") || return 1
  grep -xE '[0-9]+' <<<"$said" | sort -n | tail -n 1
}
on_a_worker() {  # what local.sh makes of it there, in a home directory that nobody here knows
  local lines here
  lines=$(env -i PATH="$PATH" HOME=HOME bash "$ROOT/launch/local.sh" --dry-run "--accelerator=$accelerator" "$@")
  printf -v here %q "$ROOT"
  lines="on every worker, which finds its number, their count and the coordinator by itself:"$'\n'"${lines//"$here"/HOME/dip_jax}"
  echo "# ${lines//$'\n'/$'\n'# }"
}
logs() { on_workers "$worker" 'tail -n 100 -F dip_jax/logs/worker.log'; }

stopped=''
up() {
  local code now crashes=0
  while :; do
    code=0
    { create && sync && install; } || code=$?
    case "$code" in
      0) run "$@" || code=$? ;;
      "$gone") ;;
      *) return "$code" ;;
    esac
    case "$code" in
      0) return 0 ;;
      2|3|86|130) say "the command ended with $code: not repeated"; return "$code" ;;
      "$unknown") return 1 ;;
    esac
    [ -z "$stopped" ] || return 130
    now=$(state) || return 1
    case "$now" in
      ACTIVE)
        if [ "$code" = 85 ]; then crashes=0; else crashes=$((crashes + 1)); fi
        [ "$crashes" -le 3 ] || { say "three failures in a row"; return 1; } ;;
      SUSPENDING|SUSPENDED)
        say "preempted: asking for another slice"
        crashes=0
        give_back || return 1 ;;
      FAILED)
        crashes=$((crashes + 1))
        [ "$crashes" -le 3 ] || { say "three failures in a row; status and gcloud say why the request is refused"; return 1; }
        give_back || return 1 ;;
      NONE) say "somebody deleted $name: not asked for again"; return 1 ;;
      *) sleep "$poll" ;;
    esac
  done
}
give_back() {  # a request that was seen to have no machines
  local now tries=0
  while now=$(state); do
    case "$now" in
      NONE) return 0 ;;
      FAILED|SUSPENDING|SUSPENDED)
        [ "$tries" = 0 ] || again "$tries" "$name cannot be deleted" || return 1
        tries=$((tries + 1))
        delete || true ;;  # the next look says whether it is gone
      *) sleep "$poll" ;;
    esac
  done
  return 1
}

case "$action" in
  status) if [ -n "$dry_run" ]; then call queued-resources describe "$name" "${place[@]}"; else state; fi ;;
  *) "$action" "$@" ;;
esac
