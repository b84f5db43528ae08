"""Releases by way of a hub: given and fetched over HTTP, broken off, forged, private, absent."""

import dataclasses
import pathlib
import sys

import jax
import numpy as np
import pytest
from etils import epath
from faults import harness
from hub_server import HubServer
from small_models import randomise

from dip_jax import config
from dip_jax.__main__ import main
from dip_jax.checkpoints import checkpoint, hub, items, manifest
from dip_jax.errors import Exit, UserError
from dip_jax.jobs import convert
from dip_jax.models import dip
from dip_jax.runtime import storage

NAME = "hf://somebody/small"
pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")  # inside huggingface_hub


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A workdir with one step whose arrays are several files, and its averaged weights."""
    run = harness.tiny_config(pathlib.Path("pictures"))
    run = dataclasses.replace(run, sample=dataclasses.replace(run.sample, steps=2))
    params = randomise(jax.jit(dip.from_config(run.model).init)(jax.random.key(0)))
    workdir = tmp_path_factory.mktemp("run")
    path = workdir / "checkpoints" / "7"
    with items.open_writer(lambda: manifest.write_manifest(epath.Path(path))) as writer:
        writer.save(path, args=items.compose({"ema": params}, checkpoint.Record(run, {})))
    return workdir, params


@pytest.fixture
def server(tmp_path, monkeypatch):
    """A hub, empty, and an empty cache."""
    constants = pytest.importorskip("huggingface_hub.constants", reason="huggingface_hub of the extra `test` is not installed")
    with HubServer() as server:
        monkeypatch.setenv("HF_ENDPOINT", server.endpoint)
        monkeypatch.delenv("HF_TOKEN", raising=False)
        monkeypatch.setattr(constants, "ENDPOINT", server.endpoint)
        monkeypatch.setattr(
            constants, "HUGGINGFACE_CO_URL_TEMPLATE", server.endpoint + "/{repo_id}/resolve/{revision}/{filename}"
        )
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
        monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "token"))
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_PROGRESS_BARS", True)
        yield server


def equal(a, b) -> bool:
    return all(jax.tree.leaves(jax.tree.map(lambda x, y: np.array_equal(np.asarray(x), np.asarray(y)), a, b)))


def largest(server: HubServer) -> str:
    files = server.files("somebody/small")
    return max(files, key=lambda name: len(files[name]))


def test_up_and_down_again(server, trained, capsys):
    workdir, params = trained
    assert main(["convert", "--to=release", f"--checkpoint={workdir}", f"--out={NAME}"]) == Exit.DONE
    assert f"{server.endpoint}/somebody/small/commit/" in capsys.readouterr().out
    repository = server.repositories["somebody/small"]
    assert repository.private and len(repository.commits) == 2  # the empty one, and one that brings all
    assert f'load("{NAME}")' in server.files("somebody/small")["README.md"].decode()
    assert equal(checkpoint.load(NAME)[1], params)
    assert "README.md" not in "".join(server.downloads())
    before = len(server.downloads())
    assert before and equal(checkpoint.load(NAME)[1], params)
    assert len(server.downloads()) == before  # from the cache


def test_a_folder_and_a_branch_of_it(server, trained, tmp_path):
    workdir, params = trained
    convert.give_release(workdir, out=f"{NAME}/v1/ema@next")
    assert not server.files("somebody/small")
    assert all(name.startswith("v1/ema/") for name in server.files("somebody/small", "next"))
    commit = server.repositories["somebody/small"].branches["next"]
    for revision in ("next", commit):
        assert equal(checkpoint.load(f"{NAME}/v1/ema@{revision}")[1], params)
    release = convert.make_release(f"{NAME}/v1/ema@next", out=tmp_path / "copy")
    assert equal(checkpoint.load(release)[1], params)
    with pytest.raises(UserError, match="no such branch, tag or commit"):
        checkpoint.load(f"{NAME}@nowhere")
    with pytest.raises(UserError, match="holds no release"):
        checkpoint.load(NAME)


def test_a_pytorch_file_is_converted_from_the_hub(server, trained, tmp_path, capsys):
    small = dip.build("DiP-tiny/16", depth=1, head="coord_mlp", image_size=32, num_classes=3)
    params = randomise(jax.jit(small.init)(jax.random.key(0)))
    run = dataclasses.replace(harness.tiny_config(pathlib.Path("pictures")), model=small.config)
    checkpoint.write_weights(tmp_path / "run", params, config=run)
    convert.export("safetensors", checkpoint=tmp_path / "run", out=tmp_path / "w.safetensors")
    server.create("somebody/small")
    server.commit("somebody/small", {"weights/w.safetensors": (tmp_path / "w.safetensors").read_bytes()})
    convert.convert(checkpoint=f"{NAME}/weights/w.safetensors", image_size=(32,), out=tmp_path / "back")
    assert equal(checkpoint.load(tmp_path / "back")[1], params)
    with pytest.raises(UserError, match="has no such file"):
        convert.convert(checkpoint=f"{NAME}/weights/x.safetensors", out=tmp_path / "other")


def test_a_run_starts_from_an_address(server, trained):
    convert.give_release(trained[0], out=NAME)
    origin = checkpoint.read_origin(config.Train(init_from=str(storage.absolute(NAME))))
    assert equal(origin.params, trained[1])


def test_what_is_read_alone_is_fetched(server, trained):
    convert.give_release(trained[0], out=NAME)
    server.commit("somebody/small", {"state/large": b"1" * 10_000})
    checkpoint.load(NAME)
    assert not [request for request in server.downloads() if "/state/" in request]


def test_a_broken_download_goes_on_where_it_stopped(server, trained, monkeypatch):
    convert.give_release(trained[0], out=NAME)
    name = largest(server)
    monkeypatch.setattr("time.sleep", lambda seconds: None)
    monkeypatch.setattr("huggingface_hub.constants.DOWNLOAD_CHUNK_SIZE", 256)  # what came whole is kept; else 10 MB
    server.cuts[name] = [1000, 500]
    assert equal(checkpoint.load(NAME)[1], trained[1])
    ranges = [request.split(" ")[-1] for request in server.downloads() if name in request]
    assert ranges[1:] == ["bytes=768-", "bytes=1024-"]


def test_a_download_that_stays_broken_is_one_line_and_keeps_the_files_that_came(server, trained, monkeypatch):
    convert.give_release(trained[0], out=NAME)
    name = largest(server)
    monkeypatch.setattr("time.sleep", lambda seconds: None)
    server.cuts[name] = [0] * 20
    with pytest.raises(UserError, match=r"the exchange with the hub failed \(RemoteProtocolError.*same command again"):
        checkpoint.load(NAME)
    server.cuts.clear()
    server.requests.clear()
    assert equal(checkpoint.load(NAME)[1], trained[1])
    files = server.files("somebody/small")
    assert name in "".join(server.downloads()) and len(server.downloads()) < len(files) - 1


@pytest.mark.parametrize("harm", ["flipped", "gone", "added"])
def test_what_was_not_released_is_refused(server, trained, harm):
    convert.give_release(trained[0], out=NAME)
    name, files = largest(server), server.files("somebody/small")
    if harm == "flipped":
        files[name] = files[name][:-1] + bytes([files[name][-1] ^ 1])
    elif harm == "gone":
        del files[name]
    else:
        files["ema/more"] = b"1"
    with pytest.raises(UserError, match=rf"{NAME} is not what was released \(.*\): delete .*cache/models--somebody--small and"):
        checkpoint.load(NAME)


def test_no_repository_is_made_for_nothing(server, tmp_path):
    with pytest.raises(UserError, match="is no directory"):
        convert.give_release(tmp_path / "nowhere", out=NAME)
    assert not server.repositories


def test_no_release_is_overwritten_and_a_card_stays(server, trained):
    server.create("somebody/small")
    server.commit("somebody/small", {"README.md": b"mine"})
    convert.give_release(trained[0], out=NAME)
    assert server.files("somebody/small")["README.md"] == b"mine"
    with pytest.raises(UserError, match="holds a release already: name another folder or branch"):
        convert.give_release(trained[0], out=NAME)


def test_a_refused_commit_leaves_nothing_and_the_same_command_works_later(server, trained):
    server.refuses_commits = True
    with pytest.raises(UserError, match=r"the hub answered 403: log in .* with a token that may do this"):
        convert.give_release(trained[0], out=NAME)
    assert not server.files("somebody/small")
    server.refuses_commits = False
    convert.give_release(trained[0], out=NAME)
    assert equal(checkpoint.load(NAME)[1], trained[1])


def test_without_a_token_with_a_wrong_one_and_with_the_right_one(server, trained, monkeypatch):
    convert.give_release(trained[0], out=NAME)
    server.token = "right"
    for token in (None, "wrong"):
        if token:
            monkeypatch.setenv("HF_TOKEN", token)
        with pytest.raises(
            UserError, match="not on the hub, or is private: check the name; log in with `hf auth login`, or set"
        ):
            checkpoint.load(NAME)
    monkeypatch.setenv("HF_TOKEN", "right")
    assert equal(checkpoint.load(NAME)[1], trained[1])
    server.gated = True
    with pytest.raises(UserError, match="on its owner's terms"):
        checkpoint.load("hf://somebody/small@v2")


def test_offline_the_cache_answers_or_one_line_says_so(server, trained, monkeypatch):
    from huggingface_hub import constants

    convert.give_release(trained[0], out=NAME)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(UserError, match=r"cannot be reached .* not whole in the cache"):
        checkpoint.load(NAME)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    checkpoint.load(NAME)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert equal(checkpoint.load(NAME)[1], trained[1])


def test_the_commands_take_an_address(server, trained, tmp_path, capsys):
    convert.give_release(trained[0], out=NAME)
    arguments = ["sample", f"--checkpoint={NAME}", "--num_samples=2", "--batch_size=2", f"--out={tmp_path / 'a.npz'}"]
    assert main(arguments) == Exit.DONE
    assert np.load(tmp_path / "a.npz")["arr_0"].shape[0] == 2
    assert main(["sample", "--checkpoint=hf://nobody/nothing", f"--out={tmp_path / 'b.npz'}"]) == Exit.USER_ERROR
    said = capsys.readouterr().err.strip().splitlines()
    assert said[-1].startswith("dip_jax sample: hf://nobody/nothing is not on the hub, or is private")


@pytest.mark.parametrize("command", ["train --config=configs/demo.py", "evaluate"])
def test_nothing_is_written_into_a_hub(command, capsys):
    assert main([*command.split(), f"--workdir={NAME}"]) == Exit.USER_ERROR
    assert f"--workdir={NAME} cannot be written to: a hub holds whole releases" in capsys.readouterr().err


def test_without_the_package_one_line_says_how_to_get_it(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    for arguments in ([f"--checkpoint={NAME}/a.pth", "--out=x"], ["--to=release", f"--checkpoint={NAME}", "--out=x"]):
        assert main(["convert", *arguments]) == Exit.USER_ERROR
        assert "needs another package: pip install huggingface_hub" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("text", "address"),
    [
        ("hf://a/b", hub.Address("a/b")),
        ("hf://a/b/", hub.Address("a/b")),
        ("hf://a/b@v1", hub.Address("a/b", revision="v1")),
        ("hf://a.c/b-d/e/f.pth@refs/pr/3", hub.Address("a.c/b-d", "e/f.pth", "refs/pr/3")),
    ],
)
def test_addresses(text, address):
    assert hub.parse(text) == address
    assert hub.parse(storage.absolute(text)) == address  # as `--init_from` keeps it


@pytest.mark.parametrize("text", ["hf://a", "hf://", "hf://a/b@", "hf:a/b", "hf://a/b@c@d"])
def test_what_is_no_address(text):
    with pytest.raises(UserError, match=r"is no address on the hub: write hf://OWNER/NAME\[/PATH\]\[@REVISION\]"):
        hub.parse(text)
