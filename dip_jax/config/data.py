"""What the training images are and how they are read."""

from dataclasses import dataclass

from dip_jax.config.checks import not_negative, one_of, positive


@dataclass(frozen=True)
class Data:
    """Where the training images come from and how they are read."""

    path: str = ""  # dataset directory made by `python -m dip_jax prepare`
    source: str = "folder"  # what `prepare` made it from; only used to say how to make it when it is missing
    batch_size: int = 256  # global batch, over all devices and hosts
    flip: bool = False  # mirror each image with probability 1/2
    num_workers: int = 0  # Grain worker processes; 0 reads in threads of this process
    num_threads: int = 16  # reading threads of this process (or of each worker)
    prefetch: int = 2  # batches placed on the devices ahead of the step
    on_bad_record: str = "error"  # error | replace (by a deterministic neighbour, counted)

    def __post_init__(self):
        positive("data", self, "batch_size", "prefetch", "num_threads")
        not_negative("data", self, "num_workers")
        one_of("data.on_bad_record", self.on_bad_record, ("error", "replace"))
