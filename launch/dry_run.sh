# shellcheck shell=bash
# `--dry-run` of every launcher, wherever it stands among the arguments. Source it with "$@" before the first setting is made:
# `words` are the arguments without the flag, and `dry_run` says whether it was there.
words=() dry_run=''
for dip_word in "$@"; do
  if [ "$dip_word" = --dry-run ]; then dry_run=1; else words+=("$dip_word"); fi
done
dip_found=$(while read -r dip_name; do printf '%s=%q\n' "$dip_name" "${!dip_name}"; done < <(compgen -e))

# usage: show COMMAND [arguments]: a line to paste into a shell: what the launcher set or changed in the environment, the command.
show() {
  local name setting
  while read -r name; do
    case $name in _|PWD|OLDPWD) continue ;; esac
    printf -v setting '%s=%q' "$name" "${!name}"
    case $'\n'$dip_found$'\n' in *$'\n'"$setting"$'\n'*) ;; *) printf '%s ' "$setting" ;; esac
  done < <(compgen -e | sort)
  printf '%q ' "$@"
  echo
}

# usage: act COMMAND [arguments]: runs it, or shows it where this is a dry run.
act() { if [ -n "$dry_run" ]; then show "$@"; else "$@"; fi; }
