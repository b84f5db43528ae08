"""`evaluate --samples` for sets as people have them: files, folders, datasets, several of them, and what is said of each."""

import dataclasses
import json
import pathlib

import jax.numpy as jnp
import numpy as np
import pytest
import small_data
from PIL import Image
from toy_network import halves, network

from dip_jax.__main__ import main
from dip_jax.data import shards
from dip_jax.metrics import features
from dip_jax.sampling import sample_files

SETTINGS = {
    "samples": 60,
    "seed": 3,
    "solver": "heun",
    "steps": 20,
    "guidance": 2.5,
    "interval": [0.1, 0.9],
    "t_shift": 1.0,
    "nfe": {"conditional": 40, "unconditional": 36},
    "weights": "ema",
    "step": "700",
    "model": {"dtype": "bfloat16", "depth": 3},
}


@pytest.fixture(autouse=True)
def place(toy_features, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def pictures(seed, count, *, size=4, warm=0):
    rng = np.random.default_rng(seed)
    base = rng.integers(0, 200, (count, 2, 1, 3)).repeat(size // 2, axis=1)
    images = base + rng.integers(0, 30, (count, size, size, 3)) + np.array([warm, 0, -warm])
    return np.clip(images, 0, 255).astype(np.uint8)


LABELS = np.arange(60) % 3


def write(name, images, labels=None, form="png"):
    """The images as FILE.npz, as a dataset, or else as a folder of pictures."""
    if name.endswith(".npz"):
        np.savez(name, arr_0=images, **({} if labels is None else {"arr_1": labels}))
    elif name.startswith("dataset"):
        folder = pathlib.Path(name)
        record = [(int(label), image.tobytes()) for label, image in zip(labels, images, strict=True)]
        small_data.write_dataset(folder, len(images), size=images.shape[1], classes=3, record=record.__getitem__)
    else:
        pathlib.Path(name).mkdir()
        for i, image in enumerate(images):
            label = "" if labels is None else f"_{labels[i]:04d}"
            Image.fromarray(image).save(f"{name}/{i:06d}{label}.{form}")
    return name


def evaluate(*samples, reference="r.npz", more=()):
    arguments = [f"--samples={name}" for name in samples] + [f"--reference={reference}", "--out=m.json", *more]
    code = main(["evaluate", *arguments])
    return json.loads(pathlib.Path("m.json").read_text()) if code == 0 else code


def test_one_set_in_every_form_gives_the_same_numbers():
    images, references = pictures(1, 60), pictures(2, 50)
    names = [write(name, images, LABELS) for name in ("s.npz", "s", "dataset_s")]
    forms = [write(name, references, np.arange(50) % 3) for name in ("r.npz", "r", "dataset_r")]
    rows = [row for reference in forms for row in evaluate(*names, reference=reference)["rows"]]
    assert len(rows) == 9 and rows[0]["fid_toy"] > 1
    for row in rows[1:]:
        for metric in ("N", "fid_toy", "sfid_toy", "is_toy", "precision_toy", "recall_toy"):
            assert row[metric] == pytest.approx(rows[0][metric], rel=1e-9), (row["row"], metric)


def test_identical_sets_are_at_distance_zero_and_never_below():
    for seed in range(8):
        write(f"{seed}.npz", pictures(seed, 40))
        row = evaluate(f"{seed}.npz", reference=f"{seed}.npz")["rows"][0]
        assert 0 <= row["fid_toy"] < 1e-9 and 0 <= row["sfid_toy"] < 1e-9 and row["precision_toy"] == row["recall_toy"] == 1


def test_several_sets_are_a_table_and_the_reference_is_read_once(capsys, monkeypatch):
    write("r.npz", pictures(2, 50))
    write("a.npz", pictures(1, 60), LABELS)
    write("b", pictures(3, 40))
    pathlib.Path("other").mkdir()
    write("other/a.npz", pictures(4, 30))
    seen, real = [], features.summarise
    monkeypatch.setattr(features, "summarise", lambda *a, **k: seen.append(a[1].name) or real(*a, **k))
    found = evaluate("a.npz", "b", "other/a.npz", "b", more=["--cache="])
    assert [row["row"] for row in found["rows"]] == ["a.npz", "b (1)", "other/a.npz", "b (2)"]
    assert [row["N"] for row in found["rows"]] == [60, 40, 30, 40]
    assert sorted(seen) == ["a.npz", "b", "b", "other/a.npz", "r.npz"]
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines[:5]] == ["row", "a.npz", "b", "other/a.npz", "b"] and len(
        set(map(len, lines[:5]))
    ) == 1


def test_samples_say_themselves_how_they_were_drawn(capsys):
    images = pictures(1, 60)
    output = sample_files.NpzFile("s.npz", labels=LABELS, image_shape=(4, 4, 3), batch_size=60)
    output.open(SETTINGS)
    output.write(0, images)
    output.close()
    pathlib.Path("s.npz").rename("sent.npz")  # without the JSON beside it
    write("r.npz", pictures(2, 50))
    assert evaluate("sent.npz")["sampling"] == {"sent.npz": SETTINGS}
    told = capsys.readouterr().out.splitlines()
    assert told[3:] == [
        "features    toy, images 4x4 as they are",
        "reference   r.npz, 50 images, statistics computed",
        "neighbours  k=3, 50 references",
        "weights     ema, step 700, bfloat16",
        "solver      heun, 20 steps, 40 + 36 network evaluations each",
        "guidance    2.5, where 0.1 < t < 0.9",
        "seed        3",
        "Metrics in *_toy come from another network than published FIDs; they do not compare.",
        "wrote m.json",
    ]
    write("foreign.npz", images)
    assert evaluate("sent.npz", "foreign.npz")["sampling"] == {"sent.npz": SETTINGS, "foreign.npz": {}}
    (line,) = [line for line in capsys.readouterr().out.splitlines() if "heun" in line]
    assert line.startswith("sent.npz    ema, step 700, bfloat16; heun, 20 steps")  # of one row only, so it says which


SAID = {
    "unequal": (lambda: write("s.npz", pictures(1, 60), np.arange(60) // 25), "s.npz: 10 to 25 images per class"),
    "sorted": (
        lambda: write("s.npz", pictures(1, 9000), np.arange(9000) // 900),
        "s.npz: the images lie in order of their classes",
    ),
    "bgr": (lambda: write("s.npz", pictures(1, 200, warm=40)[..., ::-1]), "s.npz: red and blue look swapped"),
}


@pytest.mark.parametrize("kind", SAID)
def test_what_spoils_a_comparison_is_said_in_the_result(kind, capsys):
    make, sentence = SAID[kind]
    name = make()
    write("r.npz", pictures(2, 200, warm=40))
    (note,) = [note for note in evaluate(name)["notes"] if note.startswith("s.npz: ")]
    assert note.startswith(sentence) and note in capsys.readouterr().out


def test_jpegs_are_said_in_the_result():
    write("jpegs", pictures(1, 60), form="jpg")
    write("r.npz", pictures(2, 50))
    assert any(note.startswith("jpegs: 60 images were compressed with loss") for note in evaluate("jpegs")["notes"])


def test_a_set_without_faults_has_no_note():
    for name in ("s.npz", "s", "dataset_s"):
        write(name, pictures(1, 60, warm=20), LABELS)
    write("r.npz", pictures(2, 50, warm=20))
    notes = evaluate("s.npz", "s", "dataset_s")["notes"]
    assert notes == ["Metrics in *_toy come from another network than published FIDs; they do not compare."]


def test_statistics_that_somebody_took_have_distances_alone(monkeypatch):
    monkeypatch.setitem(features.NETWORKS, "inception", lambda weights: network(suffix=""))
    images = pictures(1, 60)
    moments = {name: np.asarray(value, np.float64) for name, value in halves(jnp.asarray(images)).items()}
    arrays = {"mu": moments["pool"].mean(axis=0), "sigma": np.cov(moments["pool"], rowvar=False)}
    arrays |= {"mu_s": moments["spatial"].mean(axis=0), "sigma_s": np.cov(moments["spatial"], rowvar=False)}
    np.savez("statistics.npz", **arrays)
    write("s.npz", images)
    write("r.npz", pictures(2, 50))
    found = evaluate("statistics.npz", "s.npz", more=["--features=inception"])
    alone, own = found["rows"]
    assert list(alone) == ["row", "N", "fid", "sfid"] and alone["N"] is None
    assert alone["fid"] == pytest.approx(own["fid"], rel=1e-4) and alone["sfid"] == pytest.approx(own["sfid"], rel=1e-4)
    assert "statistics.npz holds no images, so distances are all that it has." in found["notes"]
    assert evaluate("statistics.npz", reference="statistics.npz", more=["--features=inception"])["rows"][0]["fid"] == 0
    assert evaluate("statistics.npz") == 2  # lite0 is another network


MISTAKES = {
    "sizes": (["b.npz"], "r.npz", "b.npz holds images of 6x6, the reference r.npz of 4x4"),
    "sizes of a later one": (["s.npz", "b.npz"], "r.npz", "b.npz holds images of 6x6, the reference r.npz of 4x4"),
    "sizes of a dataset": (["b.npz"], "dataset", "b.npz holds images of 6x6, the reference "),
    "class folders": (["s.npz"], "classes", "prepare --source=folder --from=classes --image_size=N --out=ANOTHER_DIR"),
    "nothing": (["s.npz"], "nowhere", "nowhere: no such file or directory; expected an .npz, a folder of pictures, or"),
    "no samples": (["nowhere"], "r.npz", "nowhere: no such file or directory"),
    "originals": (["originals"], "r.npz", "prepare crops of them with --image_size=N"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_one_line_that_names_the_right_set(mistake, capsys, monkeypatch):
    monkeypatch.setattr(features, "summarise", None)
    write("s.npz", pictures(1, 60))
    write("r.npz", pictures(2, 50))
    write("b.npz", pictures(1, 60, size=6))
    write("dataset", pictures(2, 50), np.arange(50) % 3)
    pathlib.Path("classes").mkdir()
    write("classes/cats", pictures(2, 50))
    small_data.write_dataset(pathlib.Path("originals"), 9)
    info = shards.read_info(pathlib.Path("originals"))
    originals = dataclasses.replace(info, image_size=None, encoding="original")
    pathlib.Path("originals/dataset.json").write_text(originals.to_json())
    samples, reference, message = MISTAKES[mistake]
    before = sorted(pathlib.Path().rglob("*"))
    assert evaluate(*samples, reference=reference) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert message in line and sorted(pathlib.Path().rglob("*")) == before


@pytest.mark.parametrize("out", ["m.csv", "m", "m.npz", "folder.json"])
def test_results_are_json_and_go_into_a_file(out, capsys, monkeypatch):
    monkeypatch.setattr(features, "summarise", None)
    pathlib.Path("folder.json").mkdir()
    assert main(["evaluate", "--samples=s.npz", "--reference=r.npz", f"--out={out}"]) == 2
    assert f"--out={out} " in capsys.readouterr().err


def test_progress_is_told_where_no_bar_can_be_drawn(capsys, monkeypatch):
    monkeypatch.setattr("dip_jax.metrics.inputs._LINES_APART", 0.0)
    write("s.npz", pictures(1, 60))
    write("r.npz", pictures(2, 50))
    evaluate("s.npz", more=["--batch_size=30"])
    lines = capsys.readouterr().err.splitlines()
    assert [line for line in lines if line.startswith("s.npz")] == [
        "s.npz: 60 images",
        "s.npz: 30 of 60 images",
        "s.npz: 60 of 60 images",
    ]
    assert "r.npz: 50 images" in lines
