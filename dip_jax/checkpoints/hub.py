"""Releases on the Hugging Face Hub, `hf://OWNER/NAME[/PATH][@REVISION]`: the only file that knows huggingface_hub.

That package is optional.

A release or a step is fetched into the hub's own cache (`HF_HOME`), those items of it that will be read, and verified by its
manifest: the hub's client looks at sizes alone. A repository is given a release in one commit, whole or not at all, and never
in the place of another one. `HF_TOKEN`, `HF_ENDPOINT` and `HF_HUB_OFFLINE` mean what they mean to the hub's own tools.
"""

import contextlib
import dataclasses
import os
import re
from collections.abc import Collection, Iterator
from typing import Any

from etils import epath

from dip_jax import __version__
from dip_jax.checkpoints import manifest
from dip_jax.errors import UserError, reason
from dip_jax.runtime import storage

_ADDRESS = re.compile(r"hf://(?P<repo>[\w.-]+/[\w.-]+)(?:/(?P<path>[^@]*?))?/?(?:@(?P<revision>[^@]+))?")
_FORM = "hf://OWNER/NAME[/PATH][@REVISION]"
_MANIFESTS = (manifest.SHA256, manifest.XXH128)
_LOG_IN = "log in with `hf auth login`, or set HF_TOKEN"


@dataclasses.dataclass(frozen=True)
class Address:
    """A place on the hub."""

    repo: str  # OWNER/NAME
    path: str = ""  # of a folder or file in it; empty: the whole
    revision: str | None = None  # branch, tag or commit; None: main

    @property
    def inside(self) -> str:
        """What names of files begin with there."""
        return f"{self.path}/" if self.path else ""


def parse(address: epath.PathLike) -> Address:
    """Reads an address.

    Raises:
        UserError: if it is none.
    """
    found = _ADDRESS.fullmatch(os.fspath(address))
    if not found:
        raise UserError(f"{os.fspath(address)} is no address on the hub: write {_FORM}")
    return Address(found["repo"], found["path"] or "", found["revision"])


def fetch(address: epath.PathLike, *, verify: bool = True, unread: Collection[str] = ()) -> epath.Path:
    """A release or step in the local cache; what is there already is not fetched again.

    Args:
        address: of a release, or of one step of a workdir.
        verify: hash what will be read and compare with its manifest.
        unread: items that the caller will not read; they stay on the hub.

    Raises:
        UserError: if it cannot be had, is no checkpoint of ours, or is not what its manifest says.
    """
    place, hub = parse(address), _import_hub()
    wanted = [f"{place.inside}{item}/*" for item in manifest.ITEMS if item not in unread]
    wanted += [f"{place.inside}{name}" for name in _MANIFESTS]
    ignored = [f"{place.inside}{item}/*" for item in unread]
    with _explained(address, hub):
        patterns = {"allow_patterns": wanted, "ignore_patterns": ignored}
        folder = hub.snapshot_download(place.repo, revision=place.revision, **patterns, **_options())
    path = epath.Path(folder) / place.path
    if not (path / "config").is_dir():
        raise UserError(
            f"{address} holds no release (an item config and its manifest): name the folder that does, "
            "such as hf://OWNER/NAME/checkpoints/1000"
        )
    if verify and (fault := manifest.damage(path, unread=unread)):
        cached = epath.Path(folder).parent.parent
        raise UserError(f"{address} is not what was released ({fault}): delete {cached} and try again, or tell its owner")
    return path


def fetch_file(address: epath.PathLike) -> str:
    """One file, such as PyTorch weights, in the local cache; returns its path there.

    Raises:
        UserError: if it cannot be had.
    """
    place, hub = parse(address), _import_hub()
    if not place.path:
        raise UserError(f"{address} names no file: write hf://OWNER/NAME/FILE[@REVISION]")
    with _explained(address, hub):
        return hub.hf_hub_download(place.repo, place.path, revision=place.revision, **_options())


def prepare_upload(address: epath.PathLike) -> None:
    """Makes the repository (private) and the branch where they are missing, and sees that no release is in the way.

    Raises:
        UserError: if one is, or the hub refuses.
    """
    place, hub = parse(address), _import_hub()
    api = hub.HfApi(**_options())
    with _explained(address, hub):
        api.create_repo(place.repo, private=True, exist_ok=True)
        if place.revision:
            api.create_branch(place.repo, branch=place.revision, exist_ok=True)
        there = api.list_repo_files(place.repo, revision=place.revision)
    if any(name.startswith(f"{place.inside}config/") or name in _manifests(place) for name in there):
        raise UserError(
            f"{address} holds a release already: name another folder or branch, "
            f"hf://{place.repo}/FOLDER or hf://{place.repo}@BRANCH"
        )


def upload(folder: epath.Path, address: epath.PathLike) -> str:
    """Gives a folder to the hub in one commit; returns the commit's page. A model card that is there already stays.

    Call `prepare_upload` before.

    Raises:
        UserError: if the hub refuses or cannot be reached.
    """
    place, hub = parse(address), _import_hub()
    api = hub.HfApi(**_options())
    with _explained(address, hub):
        there = api.list_repo_files(place.repo, revision=place.revision)
        names = [
            name for name in sorted(manifest.files_below(folder)) if name != "README.md" or place.inside + name not in there
        ]
        operations = [hub.CommitOperationAdd(place.inside + name, os.fspath(folder / name)) for name in names]
        message = f"Release by dip_jax {__version__}"
        done = api.create_commit(place.repo, operations, commit_message=message, revision=place.revision)
    return done.commit_url


def _manifests(place: Address) -> list[str]:
    return [f"{place.inside}{name}" for name in _MANIFESTS]


def _import_hub() -> Any:
    try:
        import huggingface_hub.errors
    except ImportError as error:
        raise UserError(f"{storage.HUB}... needs another package: pip install huggingface_hub") from error
    return huggingface_hub


def _options() -> dict[str, Any]:
    return {"endpoint": os.environ.get("HF_ENDPOINT") or None, "library_name": "dip_jax", "library_version": __version__}


@contextlib.contextmanager
def _explained(address: epath.PathLike, hub: Any) -> Iterator[None]:
    """What the hub's client raises as one line that says what to do."""
    errors = hub.errors
    try:
        yield
    except errors.GatedRepoError as error:
        raise UserError(f"{address} is given on its owner's terms: accept them on its page, then {_LOG_IN}") from error
    except errors.RepositoryNotFoundError as error:
        raise UserError(f"{address} is not on the hub, or is private: check the name; {_LOG_IN} where it is private") from error
    except errors.RevisionNotFoundError as error:
        raise UserError(f"{address}: there is no such branch, tag or commit; the revision stands last, {_FORM}") from error
    except errors.LocalEntryNotFoundError as error:
        raise UserError(
            f"{address} cannot be reached ({reason(error.__cause__ or error)}) and is not whole in the cache: "
            "try again where the hub can be reached; what came through stays in the cache"
        ) from error
    except errors.EntryNotFoundError as error:
        raise UserError(f"{address}: the hub has no such file") from error
    except errors.HfHubHTTPError as error:
        status = error.response.status_code if error.response is not None else "no"
        advice = f": {_LOG_IN}, with a token that may do this" if status in (401, 403) else ": try again later"
        raise UserError(f"{address}: the hub answered {status}{advice}") from error
    except UserError:
        raise
    except Exception as error:  # the client and the libraries below it have many types for a broken connection
        raise UserError(f"{address}: the exchange with the hub failed ({reason(error)}): run the same command again") from error
