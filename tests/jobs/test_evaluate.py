"""The evaluate command and its public function, with a feature network small enough to compute by hand."""

import dataclasses
import json
import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import small_data
from absl import flags
from faults import harness
from toy_network import D, halves, network

from dip_jax import config
from dip_jax.checkpoints import checkpoint
from dip_jax.data import prepared
from dip_jax.errors import UserError
from dip_jax.jobs import evaluate as job
from dip_jax.jobs import train
from dip_jax.metrics import features, image_sets, inputs, npz_files, statistics
from dip_jax.metrics.judge import Judge
from dip_jax.models import dip
from dip_jax.runtime import storage

pytestmark = pytest.mark.usefixtures("toy_features")


def pictures(seed, count, *, size=4, brightness=0):
    rng = np.random.default_rng(seed)
    base = rng.integers(0, 200, (count, 2, 1, 3)).repeat(size // 2, axis=1)
    return np.clip(base + rng.integers(0, 30, (count, size, size, 3)) + brightness, 0, 255).astype(np.uint8)


def expected_metrics(samples, references, suffix="_toy"):
    ours, theirs = (jax.tree.map(np.asarray, halves(jnp.asarray(images))) for images in (samples, references))

    def gaussian(rows):
        return statistics.Gaussian(rows.mean(axis=0).astype(np.float64), np.cov(rows.astype(np.float64), rowvar=False))

    both = statistics.precision_recall(ours["pool"], theirs["pool"])
    values = {
        "fid": statistics.frechet_distance(gaussian(ours["pool"]), gaussian(theirs["pool"])),
        "sfid": statistics.frechet_distance(gaussian(ours["spatial"]), gaussian(theirs["spatial"])),
        "is": statistics.inception_score(ours["logits"]),
        "precision": both.precision,
        "recall": both.recall,
    }
    return {"N": len(samples)} | {name + suffix: value for name, value in values.items()}


@pytest.mark.parametrize("batch_size", [1, 7, 64])
def test_metrics_are_those_of_the_features_whatever_the_batch(batch_size):
    samples, references = pictures(1, 60), pictures(2, 50, brightness=20)
    found = job.evaluate(samples, references, features="lite0", batch_size=batch_size)
    expected = expected_metrics(samples, references)
    assert list(found.metrics) == list(expected)
    for name, value in expected.items():
        assert found.metrics[name] == pytest.approx(value, rel=1e-4), name


def test_the_protocol_says_how(tmp_path):
    np.savez(tmp_path / "r.npz", arr_0=pictures(2, 50))
    found = job.evaluate(pictures(1, 30), tmp_path / "r.npz", features="lite0")
    protocol = json.loads(json.dumps(found.protocol))
    assert protocol["features"] == "toy" and protocol["features_sha256"] == "0" * 64
    assert protocol["reference_images"] == 50 and protocol["input"] == "4x4 as they are"
    assert protocol["reference_fingerprint"] == storage.file_digest(tmp_path / "r.npz")
    assert "5000" in protocol["inception_score"] and "k=3" in protocol["precision_recall"]


def test_few_samples_are_called_so():
    assert any("biased" in note for note in job.evaluate(pictures(1, D), pictures(2, 50), features="lite0").notes)
    assert not any("biased" in note for note in job.evaluate(pictures(1, D + 1), pictures(2, 50), features="lite0").notes)


def test_a_reference_is_summarised_once_and_its_copy_survives_damage(tmp_path, monkeypatch):
    samples, references = pictures(1, 40), pictures(2, 50)
    first = job.evaluate(samples, references, features="lite0", cache=tmp_path)
    (kept,) = tmp_path.iterdir()
    seen = []
    real = features.summarise
    monkeypatch.setattr("dip_jax.metrics.features.summarise", lambda *a, **k: seen.append(a[1].count) or real(*a, **k))
    assert job.evaluate(samples, references, features="lite0", cache=tmp_path).metrics == first.metrics
    assert seen == [40]
    assert job.evaluate(samples, pictures(3, 50), features="lite0", cache=tmp_path).metrics != first.metrics
    kept.write_bytes(kept.read_bytes()[:100])
    assert job.evaluate(samples, references, features="lite0", cache=tmp_path).metrics == first.metrics
    assert seen == [40, 50, 40, 50, 40] or sorted(seen) == [40, 40, 40, 50, 50]


def test_a_cache_that_cannot_be_written_does_not_matter(tmp_path):
    (tmp_path / "file").write_text("")
    job.evaluate(pictures(1, 10), pictures(2, 10), features="lite0", cache=tmp_path / "file" / "below")


def test_statistics_of_a_reference_file_are_used_where_the_network_is_theirs(tmp_path):
    samples, references = pictures(1, 60), pictures(2, 50)
    moments = {name: jax.tree.map(np.asarray, halves(jnp.asarray(references)))[name] for name in ("pool", "spatial")}
    arrays = {"mu": moments["pool"].mean(axis=0) + 1, "sigma": np.cov(moments["pool"], rowvar=False)}
    arrays |= {"mu_s": moments["spatial"].mean(axis=0), "sigma_s": np.cov(moments["spatial"], rowvar=False)}
    np.savez(tmp_path / "both.npz", arr_0=references, **arrays)
    np.savez(tmp_path / "statistics.npz", **arrays)
    published = network(suffix="")
    own = Judge(published, image_sets.from_array(references))(image_sets.from_array(samples)).metrics
    both = Judge(published, npz_files.read_reference(tmp_path / "both.npz"))(image_sets.from_array(samples)).metrics
    alone = Judge(published, npz_files.read_reference(tmp_path / "statistics.npz"))(image_sets.from_array(samples)).metrics
    assert both["fid"] != pytest.approx(own["fid"], rel=1e-3) and both["sfid"] == pytest.approx(own["sfid"], rel=1e-4)
    assert both["precision"] == own["precision"] and alone["fid"] == both["fid"] and "precision" not in alone
    other = Judge(network(), npz_files.read_reference(tmp_path / "both.npz"))(image_sets.from_array(samples)).metrics
    assert other["fid_toy"] == pytest.approx(own["fid"], rel=1e-9)
    with pytest.raises(UserError, match="statistics of Inception features but no images"):
        Judge(network(), npz_files.read_reference(tmp_path / "statistics.npz"))
    np.savez(tmp_path / "statistics.npz", **(arrays | {"mu": np.zeros(9), "sigma": np.eye(9)}))
    with pytest.raises(UserError, match="have 9 dimensions, expected 6"):
        Judge(published, npz_files.read_reference(tmp_path / "statistics.npz"))


def test_the_nearest_neighbour_names_the_class():
    references, labels = pictures(2, 80), np.arange(80) % 4
    gallery = image_sets.from_array(references, labels)
    judge = Judge(network(), image_sets.from_array(pictures(3, 20)), gallery=gallery)
    assert judge(gallery).metrics["nearest_toy"] == 1.0
    assert judge(image_sets.from_array(references, (labels + 1) % 4)).metrics["nearest_toy"] == 0.0
    assert "nearest_toy" not in judge(image_sets.from_array(references)).metrics


def test_the_step_across_borders_is_told_where_the_patch_size_is():
    samples = pictures(1, 20)
    found = job.evaluate(samples, pictures(2, 20), features="lite0", patch_size=2)
    assert found.metrics["border"] == pytest.approx(1 / inside_over_across(samples)) and "2x2" in found.protocol["border"]
    assert "border" not in job.evaluate(samples, pictures(2, 20), features="lite0").metrics
    with pytest.raises(UserError, match="patch_size=3 does not tile images of 4x4"):
        job.evaluate(samples, pictures(2, 20), features="lite0", patch_size=3)


def inside_over_across(images):
    wide = images.astype(float)
    steps = [np.abs(np.diff(wide, axis=axis)).mean(axis=(0, 3 - axis, 3)) for axis in (1, 2)]
    return np.mean([step[::2].mean() for step in steps]) / np.mean([step[1::2].mean() for step in steps])


def test_the_report_shows_as_many_real_images_of_every_class():
    images, labels = pictures(1, 90), np.array([0] * 60 + [1, 2] * 15)
    shown = []
    drawn = inputs.keeping(image_sets.from_array(images, labels), shown)
    assert np.array_equal(np.concatenate(list(drawn.batches(7))), images)
    kept = inputs.pictures(shown)
    assert np.bincount(kept.labels).tolist() == [8, 8, 8] and np.array_equal(kept.of(0, 8), images[:8])
    assert np.array_equal(kept.of(2, 8), images[labels == 2][:8]) and not len(inputs.pictures([]).labels)


@pytest.mark.parametrize(
    "samples, references, message",
    [
        (pictures(1, 10), pictures(2, 10, size=6), "images of 4x4, the reference array of 6x6"),
        (pictures(1, 3), pictures(2, 10), "holds 3 images; precision and recall need at least 4"),
        (pictures(1, 10), pictures(2, 2), "holds 2 images; precision and recall need at least 4"),
    ],
)
def test_sets_that_do_not_fit_are_refused_before_anything_runs(samples, references, message, monkeypatch):
    monkeypatch.setattr("dip_jax.metrics.features.summarise", lambda *a, **k: pytest.fail("ran"))
    with pytest.raises(UserError, match=message):
        job.evaluate(samples, references, features="lite0")


def test_a_set_that_breaks_its_word():
    images = image_sets.ImageSet("short", 10, (4, 4, 3), lambda size: iter([pictures(1, 6)]))
    with pytest.raises(UserError, match="announced 10 images and gave 6"):
        features.summarise(network(), images, batch_size=6)


def command(*arguments):
    values = flags.FlagValues()
    job.define_flags(values)
    values(["evaluate", *map(str, arguments)])
    job.run(values)


def test_the_command_prints_a_table_and_writes_json(tmp_path, capsys):
    np.savez(tmp_path / "s.npz", arr_0=pictures(1, 60))
    np.savez(tmp_path / "r.npz", arr_0=pictures(2, 50))
    (tmp_path / "s.npz.json").write_text(json.dumps({"guidance": 4.0, "steps": 100}))
    out = tmp_path / "metrics.json"
    names = [f"--samples={tmp_path}/s.npz", f"--reference={tmp_path}/r.npz"]
    command(*names, "--features=lite0", f"--out={out}", f"--cache={tmp_path}/cache", "--precision=highest")
    found = json.loads(out.read_text())
    assert found["rows"][0]["N"] == 60 and found["sampling"] == {"s.npz": {"guidance": 4.0, "steps": 100}}
    assert found["protocol"]["matmul_precision"] == "highest"
    printed = capsys.readouterr().out
    assert printed.splitlines()[0].split()[:3] == ["row", "N", "fid_toy"] and "guidance    4\n" in printed
    assert "features    toy, images 4x4 as they are\n" in printed and "sha256" not in printed


@pytest.mark.parametrize(
    "arguments, message",
    [
        ([], "name one of --samples"),
        (["--samples=a.npz", "--workdir=b"], "name one of"),
        (["--samples="], "name one of"),
        (["--samples=a.npz"], "--reference is missing"),
        (["--samples=a.npz", "--reference="], "--reference is missing"),
        (["--samples=a.npz", "--reference=b.npz"], r"a\.npz: no such file"),
        (["--workdir=nowhere"], "is no directory"),
    ],
)
def test_mistakes_are_one_clear_line(arguments, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=message) as error:
        command(*arguments)
    assert "\n" not in str(error.value)


@pytest.mark.slow
def test_a_users_mistake_ends_with_exit_code_2(tmp_path):
    command = [sys.executable, "-m", "dip_jax", "evaluate", "--samples=missing.npz", "--reference=missing.npz"]
    done = subprocess.run(command, cwd=tmp_path, env=os.environ | {"PYTHONPATH": os.getcwd()}, capture_output=True, text=True)
    assert done.returncode == 2 and len(done.stderr.strip().splitlines()) == 1 and "Traceback" not in done.stderr


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data") / "colours"
    small_data.write_dataset(folder, 24, size=16, classes=3)
    return folder


def test_a_dataset_gives_all_its_images_or_a_labelled_choice(dataset):
    opened = prepared.open_dataset(dataset)
    everything = np.concatenate(list(inputs.dataset_images(opened).batches(5)))
    np.testing.assert_array_equal(everything, np.stack([opened[i]["image"] for i in range(24)]))
    first, second = (inputs.dataset_images(opened, count=8, phase=phase) for phase in (0.0, 0.5))
    np.testing.assert_array_equal(next(first.batches(8)), everything[::3])
    np.testing.assert_array_equal(next(second.batches(8)), everything[1::3])
    np.testing.assert_array_equal(first.labels, [opened[i]["label"] for i in range(0, 24, 3)])
    assert inputs.dataset_images(opened, count=100).count == 24


def rows_of(folder):
    return json.loads((folder / "evaluation.json").read_text())["rows"]


@pytest.mark.slow
def test_a_workdir_gives_a_row_per_weights_and_a_report(tmp_path, capsys):
    data = harness.make_dataset(tmp_path / "set")
    run = harness.tiny_config(data, train__steps=2, eval__reference=str(data), eval__num_samples=8)
    train.train(run, workdir=tmp_path / "run")
    for more in ([], ["--quick"]):
        command(f"--workdir={tmp_path}/run", f"--cache={tmp_path}/cache", *more)
        rows = rows_of(tmp_path / "run")
        names = ["real training images", "untrained (step 0)", "last weights", "averaged weights (EMA)"]
        assert [row["row"] for row in rows] == [name for name in names if not more or name != "last weights"]
        assert all(row["N"] == 8 and list(row) == list(rows[0]) and "nearest_toy" in row for row in rows)
        assert rows[0]["fid_toy"] < rows[-1]["fid_toy"]
    sampling = json.loads((tmp_path / "run" / "evaluation.json").read_text())["sampling"]["averaged weights (EMA)"]
    assert sampling["steps"] == 2 and sampling["nfe"] == {"conditional": 2, "unconditional": 1} and sampling["step"] == "2"
    assert "averaged weights (EMA)" in (tmp_path / "run" / "report.html").read_text()
    assert "untrained" in capsys.readouterr().out


@pytest.mark.slow
def test_a_run_whose_first_weights_are_gone_is_judged_without_them(dataset, tmp_path):
    run = harness.tiny_config(dataset, train__steps=1, eval__reference=str(dataset), eval__num_samples=8)
    train.train(run, workdir=tmp_path / "first")
    begun = dataclasses.replace(run.train, init_from=str(tmp_path / "first"))
    train.train(dataclasses.replace(run, train=begun), workdir=tmp_path / "second")
    for moved in (False, True):
        if moved:
            (tmp_path / "first").rename(tmp_path / "elsewhere")
        command(f"--workdir={tmp_path}/second", f"--cache={tmp_path}/cache", "--quick")
        names = ["real training images", "as it began (step 0)", "averaged weights (EMA)"]
        assert [row["row"] for row in rows_of(tmp_path / "second")] == [
            name for name in names if not moved or "began" not in name
        ]
    (note,) = [n for n in json.loads((tmp_path / "second" / "evaluation.json").read_text())["notes"] if "began" in n]
    assert note.startswith("No row of the run as it began") and "first is no directory" in note


def test_converted_weights_are_judged_without_data_or_a_training_state(dataset, tmp_path):
    """They have the averaged weights alone, and the config of no run."""
    small = {"depth": 1, "width": 32, "num_heads": 2, "patch_size": 8, "image_size": (16, 16), "num_classes": 3}
    run = config.Config(model=config.Model(size="tiny", head_width=4, dtype="bfloat16", **small), sample=config.Sample(steps=2))
    params = jax.jit(dip.from_config(run.model).init)(jax.random.key(1))
    checkpoint.write_weights(tmp_path / "run", params, config=run)
    workdir, count = f"--workdir={tmp_path}/run", "--num_samples=8"
    with pytest.raises(UserError, match="--reference is missing"):
        command(workdir, count)
    command(workdir, count, f"--reference={dataset}", f"--cache={tmp_path}/cache", "--precision=highest")
    drawn = json.loads((tmp_path / "run" / "evaluation.json").read_text())["sampling"]["averaged weights (EMA)"]
    assert drawn["dtype"] == "float32"
    (row,) = rows_of(tmp_path / "run")
    assert row["row"] == "averaged weights (EMA)" and row["N"] == 8 and "nearest_toy" not in row
    assert "class 2" in (tmp_path / "run" / "report.html").read_text()


def test_a_run_whose_data_went_elsewhere_is_judged_and_says_what_is_missing(dataset, tmp_path, capsys):
    small = {"depth": 1, "width": 32, "num_heads": 2, "patch_size": 8, "image_size": (16, 16), "num_classes": 3}
    model = config.Model(size="tiny", head="none", dtype="float32", **small)
    run = config.Config(model=model, sample=config.Sample(steps=2), data=config.Data(path=str(tmp_path / "gone")))
    checkpoint.write_weights(tmp_path / "run", jax.jit(dip.from_config(model).init)(jax.random.key(1)), config=run)
    command(f"--workdir={tmp_path}/run", "--num_samples=8", f"--reference={dataset}", f"--cache={tmp_path}/cache")
    printed = capsys.readouterr()
    assert "No row of real images and no nearest neighbour: no dataset at" in printed.out
    assert [line for line in printed.err.splitlines() if not line.startswith("data")][:3] == [
        f"reading the newest checkpoint of {tmp_path}/run",
        "step 0: 8 samples each of averaged weights (EMA)",
        "averaged weights (EMA): 8 images",
    ]


@pytest.mark.parametrize(
    "argument, others",
    [("--quick", "samples"), ("--num_samples=3", "samples"), ("--seed=1", "samples"), ("--patch_size=8", "workdir")],
)
def test_a_flag_that_nothing_would_read_is_refused(argument, others):
    sources = ["--samples=a.npz", "--reference=b.npz"] if others == "samples" else ["--workdir=run"]
    name = argument.partition("=")[0]
    with pytest.raises(UserError, match=f"^{name} would not be read beside the other flags: leave out what --help says"):
        command(*sources, argument)
