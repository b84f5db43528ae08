# shellcheck shell=bash
# What a cluster cannot answer just now is asked again. Source it, with `poll` set: the first pause in seconds.

# usage: again TRIES WHAT: waits before the next try, twice as long every time (a quarter of an hour in all, from 30 s on); after
# the sixth it says so and is false. WHAT is what failed, in words.
again() {
  : "${poll:?}"
  if [ "$1" -ge 6 ]; then
    echo "${0##*/}: $2; that was try $1, the last" >&2
    return 1
  fi
  echo "${0##*/}: $2; again in $((poll << ($1 - 1))) s" >&2
  sleep $((poll << ($1 - 1)))
}
