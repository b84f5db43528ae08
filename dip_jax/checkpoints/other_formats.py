"""What lies at a path that is no checkpoint of ours, in words: the second half of an error message."""

from etils import epath

_TORCH = (".pt", ".pth", ".ckpt", ".bin", ".safetensors")
_UNFINISHED = ".orbax-checkpoint-tmp"  # in the name of a step that was being written


def describe(path: epath.Path) -> str:
    """One clause about an existing file or directory: "is ..." or "holds ...", and what to do with it where that is known."""
    if path.is_file():
        if path.suffix in _TORCH:
            return "is a PyTorch file: make a checkpoint of it with `python -m dip_jax convert`"
        return "is a file, not a directory"
    names = sorted(child.name for child in path.iterdir())
    files = [name for name in names if name.endswith(_TORCH)]
    if "dataset.json" in names:
        return "holds a dataset, not a checkpoint"
    if files:
        return f"holds a PyTorch file ({files[0]}): make a checkpoint of it with `python -m dip_jax convert`"
    if any(_UNFINISHED in name for name in names):
        return "holds only a save that was not finished: the run was stopped before its first checkpoint"
    if {"_METADATA", "_CHECKPOINT_METADATA", "manifest.ocdbt", "default"} & set(names):
        return f"holds a checkpoint of another layout ({_listed(names)}): it lacks the item config, which dip_jax writes"
    if any(name.startswith("checkpoint_") or name.endswith(".msgpack") for name in names):
        return f"holds a checkpoint of another library ({_listed(names)})"
    return f"holds {_listed(names)}" if names else "is empty"


def _listed(names: list[str]) -> str:
    return ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")
