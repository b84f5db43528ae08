# shellcheck shell=bash
# Environment of every launcher: source it with the accelerator (auto|cpu|cuda|tpu). A reason beside each setting; what is
# already set in the environment stays. Versions of JAX and its plugins: requirements.txt and the extras of pyproject.toml.

# The interpreter of install.sh, or another that has the package: a cluster's module, a container.
dip_launch=$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")" && pwd)
export PYTHON=${PYTHON:-${dip_launch%/*}/.venv/bin/python}

# Compile once per machine: a second start of the same step takes seconds instead of minutes.
export JAX_COMPILATION_CACHE_DIR=${JAX_COMPILATION_CACHE_DIR:-${XDG_CACHE_HOME:-$HOME/.cache}/dip_jax/xla}
export JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS=${JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS:-1}

# Name what was found: dip_jax ends with one line where the first of these is not there, and never falls back to the CPU.
dip_platform=${1:-auto}
if [ "$dip_platform" = auto ]; then
  if [ -n "${JAX_PLATFORMS:-}" ]; then dip_platform=chosen; else dip_platform=$(bash "$dip_launch/accelerator.sh") || exit 2; fi
fi
case "$dip_platform" in
  cpu) export JAX_PLATFORMS=cpu ;;
  cuda) export JAX_PLATFORMS=cuda,cpu ;;
  tpu) export JAX_PLATFORMS=tpu,cpu ;;
  chosen) ;;
  *) echo "env.sh: accelerator '$dip_platform' is unknown: it is one of auto, cpu, cuda, tpu" >&2; exit 2 ;;
esac

if [[ $JAX_PLATFORMS == cuda* ]]; then
  # JAX takes three quarters of the memory by default; nothing else computes on a training GPU.
  export XLA_PYTHON_CLIENT_MEM_FRACTION=${XLA_PYTHON_CLIENT_MEM_FRACTION:-0.92}
  # Collectives start as early and end as late as the data allow, so that products run beside them.
  export XLA_FLAGS="${XLA_FLAGS:-} --xla_gpu_enable_latency_hiding_scheduler=true"
  # Say why a link fails; the default says nothing. NCCL_SOCKET_IFNAME names the interface where NCCL picks a wrong one.
  export NCCL_DEBUG=${NCCL_DEBUG:-WARN}
fi

if [[ $JAX_PLATFORMS == cpu ]]; then
  # XLA asks for its buffers anew in every step. glibc gives large ones back to the system at once, which then clears their pages
  # again: a fifth of a small model's step (0.27 against 0.22 s in turns). One heap that only grows keeps them.
  export MALLOC_ARENA_MAX=${MALLOC_ARENA_MAX:-1} MALLOC_MMAP_MAX_=${MALLOC_MMAP_MAX_:-0}
  export MALLOC_TRIM_THRESHOLD_=${MALLOC_TRIM_THRESHOLD_:-17179869184}
fi

# A line is read when it is printed, also through a pipe.
export PYTHONUNBUFFERED=1
