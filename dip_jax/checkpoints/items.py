"""The items of a step as Orbax writes and reads them: the only file that knows Orbax."""

import dataclasses
import json
import os
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp
from etils import epath

from dip_jax.checkpoints import mismatch
from dip_jax.config import Config, from_dict, to_dict
from dip_jax.errors import UserError, reason
from dip_jax.runtime import membership

FILE_BYTES = 2**26  # one file is hashed by one core: many of middling size keep all cores busy


@dataclasses.dataclass(frozen=True)
class Record:
    """The `config` item: everything about a run that is not an array."""

    config: Config
    data: dict[str, Any]  # `data.order.identity`, and the teacher; empty for converted weights
    skipped: int = 0  # updates not applied because of a non-finite number, so far
    replaced: int = 0  # bad records replaced by a neighbour, so far
    classes: tuple[str, ...] = ()  # their names by label, where they are known
    stored: str = "float32"  # dtype of the arrays of `ema`; a release may have bfloat16


def read_record(path: epath.Path) -> Record:
    """The `config` item of a step directory.

    Raises:
        UserError: if it is missing, or was written with options that this version does not know.
    """
    try:
        values = json.loads((path / "config" / "metadata").read_text())
        later = {  # what older checkpoints lack
            "replaced": int(values.get("replaced", 0)),
            "classes": tuple(str(name) for name in values.get("classes", ())),
            "stored": str(values.get("stored", "float32")),
        }
        return Record(from_dict(values["config"]), dict(values["data"]), int(values["skipped"]), **later)
    except UserError as error:
        raise UserError(f"{path} was written with other options than this version knows: {error}") from error
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{path} has no readable config item ({reason(error)}): it is no dip_jax checkpoint") from error


def open_writer(before_commit: Callable[[], None]) -> ocp.AsyncCheckpointer:
    """Writes in the background what `compose` made; `before_commit` is called when the last file of all hosts is there.

    A save of more than `--save_seconds` fails with a TimeoutError.
    """
    patience = membership.find_patience(os.environ)
    options = ocp.AsyncOptions(timeout_secs=patience.save, post_finalization_callback=before_commit)
    return ocp.AsyncCheckpointer(ocp.CompositeCheckpointHandler(), async_options=options)


def compose(arrays: Mapping[str, Any], record: Record, *, file_bytes: int = FILE_BYTES) -> ocp.args.Composite:
    """A step for the writer: each tree of arrays an item of its name in files of about `file_bytes`, and the record."""
    items = {name: ocp.args.PyTreeSave(tree, ocdbt_target_data_file_size=file_bytes) for name, tree in arrays.items()}
    values = dataclasses.asdict(record) | {"config": to_dict(record.config)}
    config = ocp.args.JsonSave(json.loads(json.dumps(values)))  # tuples as lists, as they will be read
    return ocp.args.Composite(**items, config=config)


def read_arrays(item: epath.Path, target: Any, *, partial: bool = False) -> Any:
    """Arrays of one item as `target` (a tree of `ShapeDtypeStruct`, on the default device where it names no sharding)."""
    if not item.is_dir():
        there = sorted(child.name for child in item.parent.iterdir() if child.is_dir())
        others = ": released and converted weights are often these alone, load them with weights='ema', draw them without noema"
        instead = others if "ema" in there else ""
        raise UserError(f"{item.parent} holds no item {item.name!r}, only {', '.join(there)}{instead}")
    local = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    target = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding or local), target)
    # The handler, not a checkpointer around it: that would ask for a marker which copies from another kind of storage lack.
    reader = ocp.PyTreeCheckpointHandler()
    try:
        stored = reader.metadata(item).tree
        if difference := mismatch.describe(stored, target, partial=partial):
            raise UserError(f"{item} does not fit this model: {difference}")
        restore_args = ocp.checkpoint_utils.construct_restore_args(target)
        args = ocp.args.PyTreeRestore(item=target, restore_args=restore_args, partial_restore=partial)
        return reader.restore(item, args=args)
    except UserError:
        raise
    except Exception as error:  # Orbax and its storage report what they cannot read by many types
        raise UserError(f"{item} cannot be read ({reason(error)}): use another step of the same workdir") from error
    finally:
        reader.close()


def read_stored(item: epath.Path, target: Any, *, stored: str) -> Any:
    """As `read_arrays`, of arrays that were stored in another dtype than the target's."""
    there = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, jnp.dtype(stored), sharding=x.sharding), target)
    found = read_arrays(item, there)
    if there == target:
        return found
    return jax.jit(lambda tree: jax.tree.map(lambda x, wanted: x.astype(wanted.dtype), tree, target))(found)
