# shellcheck shell=bash
# Environment of every launcher: source it with the accelerator (auto|cpu|cuda|tpu). A reason beside each setting.

# Compile once per machine: a second start of the same step takes seconds instead of minutes.
export JAX_COMPILATION_CACHE_DIR=${JAX_COMPILATION_CACHE_DIR:-${XDG_CACHE_HOME:-$HOME/.cache}/dip_jax/xla}
export JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS=${JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS:-1}

# Fail here, with a clear message, rather than fall back to the CPU in silence.
case "${1:-auto}" in
  cpu) export JAX_PLATFORMS=cpu ;;
  cuda) export JAX_PLATFORMS=cuda,cpu ;;
  tpu) export JAX_PLATFORMS=tpu,cpu ;;
esac

# A line is read when it is printed, also through a pipe.
export PYTHONUNBUFFERED=1
