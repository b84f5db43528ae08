"""The sweep: the same table however often it is stopped, the reference read once, what is cut short, the best confirmed."""

import csv
import json
import math

import jax
import numpy as np
import pytest
from faults import harness
from PIL import Image

from dip_jax import config
from dip_jax.__main__ import main
from dip_jax.checkpoints import checkpoint
from dip_jax.errors import UserError
from dip_jax.jobs import train
from dip_jax.metrics import features, sweep, sweeping
from dip_jax.models import dip

MODEL = {"size": "tiny", "depth": 1, "width": 16, "num_heads": 2, "patch_size": 8, "image_size": (16, 16), "num_classes": 4}
BASE = config.Sample(steps=2, batch_size=8)
AXES = {"solver": ["euler"], "steps": [2], "t_shift": [1.0], "interval": [(0.0, 1.0)], "guidance": [1.0, 3.0]}


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
    """Random weights, and random pictures as their reference."""
    folder = tmp_path_factory.mktemp("run")
    pictures = np.random.default_rng(0).integers(0, 256, (40, 16, 16, 3), dtype=np.uint8)
    np.savez(folder / "reference.npz", arr_0=pictures)
    values = config.to_dict(config.Config())
    values["model"] |= {**MODEL, "head": "none", "dtype": "float32", "inject_after": 1}
    values["sample"] |= {"steps": 2, "batch_size": 8}
    values["eval"] |= {"reference": str(folder / "reference.npz"), "features": "lite0", "num_samples": 16}
    settings = config.from_dict(values)
    model, key = dip.from_config(settings.model), jax.random.key(1)
    params = jax.jit(lambda: jax.tree.map(lambda p: p + 0.1 * jax.random.normal(key, p.shape), model.init(key)))()
    checkpoint.write_weights(folder, params, config=settings, step=7)
    return folder


pytestmark = pytest.mark.usefixtures("toy_features")


def command(workdir, out, *more):
    grid = ["--guidance=1,3,9", "--interval=0:1", "--interval=0:0.4", "--num_samples=30", "--cache="]
    return ["sweep", f"--workdir={workdir}", f"--out={out}", *grid, *more]


def test_a_stopped_sweep_ends_with_the_same_table_to_the_byte(workdir, tmp_path, monkeypatch, capsys):
    assert main(command(workdir, tmp_path / "whole")) == 0
    drawn, real, writes = [], sweeping.storage.write_bytes, iter(range(10_000))

    def stopping(path, data):  # in the middle of a batch's file, of a row, of a table
        drawn.append(path.name)
        if next(writes) in (3, 6, 12, 20):
            raise KeyboardInterrupt
        real(path, data)

    monkeypatch.setattr(sweeping.storage, "write_bytes", stopping)
    codes = [main(command(workdir, tmp_path / "stopped")) for _ in range(5)]
    assert codes == [130, 130, 130, 130, 0]
    for name in ("sweep.csv", "sweep.json", "sweep.png", "results.json"):
        assert (tmp_path / "whole" / name).read_bytes() == (tmp_path / "stopped" / name).read_bytes(), name
    before = len(drawn)
    assert main(command(workdir, tmp_path / "stopped")) == 0
    assert not any(name.isdecimal() for name in drawn[before:])  # nothing is drawn again
    assert not list((tmp_path / "stopped" / "drawing").glob("*"))
    rows = list(csv.DictReader((tmp_path / "whole" / "sweep.csv").read_text().splitlines()))
    assert len(rows) == 6 and {row["per_class"] for row in rows if not row["cut"]} == {"7 to 8"}
    assert [row["guidance"] for row in rows] == ["1.0", "3.0", "9.0"] * 2 and {row["seed"] for row in rows} == {"0"}
    with Image.open(tmp_path / "whole" / "sweep.png") as picture:
        assert picture.size[0] > 400
    assert "lowest fid_toy of 6 points" in capsys.readouterr().out


def test_the_reference_is_summarised_once_and_the_noise_is_shared(workdir, tmp_path, monkeypatch):
    counts, seeds = [], set()
    summarise, draw = features.summarise, sweeping.trajectories.draw_batches
    monkeypatch.setattr(features, "summarise", lambda *a, **k: counts.append(a[1].count) or summarise(*a, **k))
    monkeypatch.setattr(sweeping.trajectories, "draw_batches", lambda *a, **k: seeds.add(k["seed"]) or draw(*a, **k))
    assert main(command(workdir, tmp_path / "out", "--cut=0")) == 0
    assert counts.count(40) == 1 and counts.count(30) == 6 and seeds == {0}


def test_a_row_is_what_sample_and_evaluate_say(workdir, tmp_path):
    assert main(command(workdir, tmp_path / "out", "--cut=0")) == 0
    rows = list(csv.DictReader((tmp_path / "out" / "sweep.csv").read_text().splitlines()))
    out, judged = str(tmp_path / "samples.npz"), tmp_path / "judged.json"
    options = ["--guidance=3", "--interval=0,0.4", "--num_samples=30"]
    assert main(["sample", f"--workdir={workdir}", f"--out={out}", *options]) == 0
    assert (
        main(["evaluate", f"--samples={out}", f"--reference={workdir / 'reference.npz'}", f"--out={judged}", "--cache="]) == 0
    )
    expected = json.loads(judged.read_text())["rows"][0]
    row = next(row for row in rows if row["guidance"] == "3.0" and row["high"] == "0.4")
    assert float(row["fid_toy"]) == pytest.approx(expected["fid_toy"], rel=1e-6)
    assert float(row["recall_toy"]) == expected["recall_toy"]


def test_what_is_clearly_worse_is_cut_short(workdir, tmp_path):
    assert main(command(workdir, tmp_path / "out", "--cut=1.01")) == 0
    known = json.loads((tmp_path / "out" / "results.json").read_text())
    points = json.loads((tmp_path / "out" / "settings.json").read_text())["points"]
    cut = [bool(known[name]["row"]["cut"]) for name in points]
    firsts = [known[name]["first"] for name in points]
    assert cut == [i > 0 and first > 1.01 * min(firsts[:i]) for i, first in enumerate(firsts)] and any(cut) and not cut[0]
    assert all(known[name]["row"]["N"] == (8 if short else 30) for name, short in zip(points, cut, strict=True))
    assert (
        not sweep.is_cut(9.0, [], cut=1.5) and not sweep.is_cut(9.0, [1.0], cut=0.0) and sweep.is_cut(9.0, [1.0, 8.0], cut=1.5)
    )
    assert sweep.first_part(500, 100) == 200 and sweep.first_part(30, 64) == 30


def test_confirm_draws_the_best_with_other_seeds(workdir, tmp_path, capsys):
    more = ["--confirm", "--confirm_seeds=4,5", "--confirm_samples=20"]
    assert main(command(workdir, tmp_path / "out", *more)) == 0
    rows = list(csv.DictReader((tmp_path / "out" / "confirm.csv").read_text().splitlines()))
    assert [row["seed"] for row in rows] == ["4", "5"] and {row["N"] for row in rows} == {"20"}
    values = [float(row["fid_toy"]) for row in rows]
    said = capsys.readouterr().out
    assert "over 2 seeds, 20 samples each" in said and f"{np.mean(values):.4g} ± {np.std(values, ddof=1):.3g}" in said
    table = list(csv.DictReader((tmp_path / "out" / "sweep.csv").read_text().splitlines()))
    best = min((row for row in table if not row["cut"]), key=lambda row: float(row["fid_toy"]))
    assert all(rows[0][key] == best[key] for key in ("guidance", "low", "high", "solver", "weights"))


@pytest.mark.parametrize(
    "flags, said",
    [
        (["--guidance=1,x"], "'x' is not a number"),
        (["--guidance=1,1"], "--guidance: 1.0, 1.0: name each value once"),
        (["--interval=0.3"], "must be low:high"),
        (["--solver=rk4"], "sample.solver='rk4' is unknown"),
        (["--ema_decays=0.5"], "no average of decay 0.5"),
        (["--raw"], "holds averaged weights alone"),
        (["--cut=0.5"], "must be above 1"),
        (["--confirm", "--confirm_seeds=0,1"], "must differ from each other and from --seed=0"),
        (["--checkpoint=x"], "name one of --workdir=DIR and --checkpoint=DIR"),
        (["--reference=nowhere.npz"], "nowhere.npz"),
    ],
)
def test_mistakes_are_one_line(workdir, tmp_path, capsys, flags, said):
    assert main(["sweep", f"--workdir={workdir}", f"--out={tmp_path / 'out'}", *flags]) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert said in line and not (tmp_path / "out" / "results.json").exists()


def test_every_average_and_the_last_weights_are_points(dataset, tmp_path):
    """A run's own bank and, asked for, what `sample --noema` draws from; each row says which, and each is its own weights'."""
    run, reference = tmp_path / "run", f"--reference={tmp_path / 'reference.npz'}"
    train.train(
        harness.tiny_config(dataset, optim__ema_decays=(0.9, 0.5), optim__learning_rate=0.1, train__steps=2), workdir=run
    )
    pictures = np.random.default_rng(0).integers(0, 256, (16, 16, 16, 3), dtype=np.uint8)
    np.savez(tmp_path / "reference.npz", arr_0=pictures)
    common = [f"--workdir={run}", "--steps=2", "--num_samples=8", "--batch_size=8", reference, "--cache="]
    assert main(["sweep", *common, "--raw"]) == 0
    rows = list(csv.DictReader((run / "sweep" / "sweep.csv").read_text().splitlines()))
    assert [row["weights"] for row in rows] == ["ema 0.9", "ema 0.5", "raw"]
    assert len({row["fid_toy"] for row in rows}) == 3
    out, judged = str(tmp_path / "raw.npz"), tmp_path / "judged.json"
    assert main(["sample", *common[:4], "--noema", f"--out={out}"]) == 0
    assert main(["evaluate", f"--samples={out}", reference, f"--out={judged}", "--cache="]) == 0
    expected = json.loads(judged.read_text())["rows"][0]["fid_toy"]
    assert float(rows[2]["fid_toy"]) == pytest.approx(expected, rel=1e-6)


def test_another_grid_needs_another_folder(workdir, tmp_path, capsys):
    assert main(["sweep", f"--workdir={workdir}", f"--out={tmp_path / 'out'}", "--num_samples=16", "--cache="]) == 0
    assert main(["sweep", f"--workdir={workdir}", f"--out={tmp_path / 'out'}", "--num_samples=17", "--cache="]) == 2
    assert "was begun with other settings (num_samples: 16 -> 17)" in capsys.readouterr().err


def test_points_rows_and_spreads():
    points = sweep.grid([("ema", "ema 0.9"), ("ema_1", "ema 0.5")], BASE, **AXES)
    assert [point.name for point in points] == [
        f"{item}_euler_2_shift1_w{scale}_0_1" for item in ("ema", "ema_1") for scale in (1, 3)
    ]
    metrics = {"N": 5, "fid_lite0": 2.0, "is_lite0": 3.0}
    row = sweep.row(points[1], np.array([0, 1, 1, 2, 2]), metrics, seed=3, step="7", cut=False)
    assert row["per_class"] == "1 to 2" and row["evaluations"] == "2+1" and sweep.fid_name(row) == "fid_lite0"
    other = row | {"fid_lite0": 4.0}
    found = sweep.spreads([row, other])
    assert found["fid_lite0"].mean == 3.0 and found["fid_lite0"].deviation == pytest.approx(math.sqrt(2))
    assert list(found) == ["fid_lite0", "is_lite0"] and "±" not in str(sweep.spreads([row])["is_lite0"])
    assert sweep.best({"a": row | {"cut": "yes", "fid_lite0": 0.0}, "b": other, "c": row}) == "c"
    with pytest.raises(UserError, match=r"must lie in 1\.\.1000"):
        sweep.grid([("ema", "")], BASE, **AXES | {"steps": [0]})
