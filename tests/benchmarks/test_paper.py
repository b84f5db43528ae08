"""`python -m benchmarks.paper`: pictures from the CSVs that are there, runs that go on, numbers that mean what they say."""

import dataclasses
import json
import pathlib

import numpy as np
import pytest
from PIL import Image
from places import ROOT

from benchmarks.paper import __main__ as paper
from benchmarks.paper import figure3, figure4, figure10, measure, options, repa, scale, seeds, session, table2, tables
from dip_jax import config
from dip_jax.checkpoints import teacher
from dip_jax.errors import Exit, Interrupted, UserError

_FIELDS = {"size": "tiny", "dtype": "float32", "remat": "none", "head_remat": False, "width": 16, "depth": 1, "num_heads": 1}
TINY = scale.Scale(
    model=_FIELDS,
    photograph=_FIELDS,
    head_sizes=scale.SCALES["cpu"].head_sizes | {"unet": {"head_width": 4}},
    seeds=(0,),  # several are in the committed CSVs, which are plotted below
    steps=3,
    batch_size=8,
    num_samples=8,
    num_reference=64,
    sample=config.Sample(steps=2, guidance=2.0, interval=(0.0, 1.0), batch_size=8),
    photograph_size=32,
    photograph_steps=4,
    photograph_batch=8,
    photograph_points=2,
    points_per_class=6,
    widths=(4, 8),
    patches=(8, 16),
)


@pytest.fixture
def tiny(monkeypatch):
    monkeypatch.setitem(scale.SCALES, "tiny", TINY)


def start(figure: str, out: pathlib.Path, *flags: str) -> int:
    return paper.main([figure, "--scale=tiny", f"--out={out}", f"--work={out.parent / 'work'}", *flags])


MADE = [figure for figure in paper.EXPERIMENTS if (ROOT / "docs" / "figures" / f"{figure}.csv").exists()]


@pytest.mark.parametrize("figure", MADE)
def test_the_committed_csv_gives_the_picture(figure, tmp_path):
    for file in (ROOT / "docs" / "figures").glob(f"{figure}*"):
        if file.name != f"{figure}.png":
            (tmp_path / file.name).write_bytes(file.read_bytes())
    assert paper.main([figure, "--plot-only", f"--out={tmp_path}"]) == 0
    with Image.open(tmp_path / f"{figure}.png") as made, Image.open(ROOT / "docs" / "figures" / f"{figure}.png") as kept:
        assert made.size == kept.size
        assert made.text["Source"] == kept.text["Source"]  # of these numbers, not only of much the same
        difference = np.abs(np.asarray(made.convert("L"), float) - np.asarray(kept.convert("L"), float))
    assert difference.mean() < 2.0  # another font or renderer may draw a few pixels otherwise


def test_a_picture_without_its_csv_is_one_line(tmp_path, capsys):
    assert paper.main(["table2", "--plot-only", f"--out={tmp_path}"]) == Exit.USER_ERROR
    assert "table2.csv is missing: run the experiment" in capsys.readouterr().err


@pytest.mark.slow
def test_a_photograph_is_overfitted_and_nothing_is_done_twice(tiny, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(figure3, "MODELS", {"DiP (U-Net)": "unet"})
    monkeypatch.setattr(figure3, "PREDICTIONS", {"x": "predicts the image"})
    assert start("figure3", tmp_path / "out", "--budget=0") == Exit.PREEMPTED
    assert "the budget is over, 0 of 1 runs are done" in capsys.readouterr().err
    assert start("figure3", tmp_path / "out") == 0
    rows = tables.read(tmp_path / "out" / "figure3.csv")
    assert [row["step"] for row in rows] == [2, 4] and all(0 < row["psnr"] < 60 for row in rows)
    assert rows[1]["seconds"] == pytest.approx(2 * rows[0]["seconds"], rel=1e-4)
    with Image.open(tmp_path / "out" / "figure3_images.png") as strip:
        assert strip.size == (64, 32)
    before = (tmp_path / "out" / "figure3.csv").read_bytes()

    def refuse(*args, **kwargs):
        raise AssertionError("trained twice")

    monkeypatch.setattr("dip_jax.jobs.train.train", refuse)
    monkeypatch.setattr(measure, "step_seconds", refuse)
    assert start("figure3", tmp_path / "out") == 0
    assert (tmp_path / "out" / "figure3.csv").read_bytes() == before
    monkeypatch.setitem(scale.SCALES, "tiny", dataclasses.replace(TINY, photograph_steps=6))
    assert start("figure3", tmp_path / "out") == Exit.USER_ERROR
    assert "holds a run of another config (" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.parametrize("figure", ["figure3", "table2", "figure10", "figure4", "repa", "options"])
def test_every_experiment_runs_at_a_tiny_size(figure, tiny, tmp_path_factory, monkeypatch):
    folder = tmp_path_factory.getbasetemp() / "paper"  # the experiments share their runs
    folder.mkdir(exist_ok=True)
    monkeypatch.setattr(figure10, "DEPTHS", (1, 4))
    for module, kept in ((table2, ("DiT-only", table2.POST_HOC)), (options, ("plain", "internal guidance"))):
        monkeypatch.setattr(module, "VARIANTS", {name: module.VARIANTS[name] for name in kept})
    assert start(figure, folder / "out") == 0
    assert (folder / "out" / f"{figure}.png").stat().st_size > 10_000


def test_points_of_the_figures_are_the_variants_of_the_paper():
    assert [fields["head"] for fields in table2.VARIANTS.values()][:5] == ["none", "mlp", "attention", "coord_mlp", "unet"]
    assert {fields.get("placement") for fields in table2.VARIANTS.values()} == {None, "intermediate", "hybrid"}
    assert set(figure4.SHOWN) <= set(table2.VARIANTS)
    runs = {}
    for panel, line, value, fields in figure10.variants(scale.SCALES["cpu"]):
        made = scale.photo_crops_config(scale.SCALES["cpu"], seed=0, data="", **fields)
        runs[panel, line, value] = (table2.run_name(fields, seed=0), made.model)
    assert runs["depth", "DiP", 4] == runs["width", "DiP", 32] == runs["patch", "DiP", 16]  # trained once
    assert [runs["depth", "DiP", depth][1].head_depth for depth in (1, 2, 3)] == [1, 2, 3]
    assert [runs["width", "DiP", width][1].head_width for width in (8, 16, 32)] == [8, 16, 32]
    assert runs["patch", "DiT-only", 32][1].patch_size == 32 and runs["patch", "DiT-only", 32][1].head == "none"


def test_all_runs_see_equal_steps_data_and_objective():
    for size in scale.SCALES.values():
        made = [scale.photo_crops_config(size, seed=3, data="d", **fields) for fields in table2.VARIANTS.values()]
        assert {(c.train.steps, c.train.seed, c.data, c.flow, c.optim, c.model.prediction) for c in made} == {
            (size.steps, 3, made[0].data, made[0].flow, made[0].optim, "x")
        }


def test_equal_time_is_the_post_hoc_u_nets():
    assert table2.equal_time({"DiT-only": 0.5, table2.POST_HOC: 2.0, "slow": 300.0}, steps=50) == {
        "DiT-only": 200,
        table2.POST_HOC: 50,
        "slow": 1,
    }


def test_neighbours_are_told_apart_or_not():
    values = {"third": {0: 9.0, 1: 9.2, 2: 8.9}, "first": {0: 1.0, 1: 1.1, 2: 1.2}, "second": {0: 1.3, 1: 1.0, 2: 1.3}}
    found = seeds.neighbours(values)
    assert [row["variant"] for row in found] == ["first", "second", "third"]
    assert [row["beside the next"] for row in found] == ["cannot be told apart", "better", ""]
    assert (found[1]["low"], found[1]["high"]) == (1.0, 1.3)


def test_alignment_runs_differ_in_the_teachers_term_alone(tmp_path):
    file = repa.random_teacher(tmp_path / "t.safetensors")
    written = file.read_bytes()
    encoder, params = teacher.load_teacher(file)
    assert encoder == repa.RANDOM and params
    file.unlink()
    assert repa.random_teacher(file).read_bytes() == written
    rows = [
        {"head": "none", "alignment": way, "seed": seed, "loss": 1.0 + seed - (way == "with") * 0.5, "fid_lite0": 2.0}
        for seed in (0, 1, 2)
        for way in repa.WEIGHTS
    ]
    found = {row["metric"]: row for row in repa.verdicts(rows)}
    assert (found["loss"]["difference"], found["loss"]["with"]) == (-0.5, "better")
    assert found["fid_lite0"]["with"] == "cannot be told apart"


def test_likeness_is_psnr_and_a_share_of_the_fine_detail():
    rows, columns = np.mgrid[:64, :64]
    fine = np.repeat(((rows + columns) % 2 * 255).astype(np.uint8)[..., None], 3, axis=2)
    coarse = np.repeat((rows * 3).astype(np.uint8)[..., None], 3, axis=2)
    assert measure.likeness(fine, fine) == {"psnr": pytest.approx(120.0), "high_frequency_error": 0.0}
    flat = np.full_like(fine, 128)
    assert measure.likeness(flat, fine)["high_frequency_error"] == pytest.approx(1.0, abs=0.02)
    assert measure.likeness(flat, fine)["psnr"] == pytest.approx(6.0, abs=0.1)
    darker = (coarse * 0.8).astype(np.uint8)
    assert measure.likeness(darker, coarse)["psnr"] < 30


def test_tables_are_read_as_they_were_written(tmp_path):
    rows = [{"variant": "U-Net, post-hoc", "seed": 0, "loss": 0.123456789}, {"variant": "b", "seed": 1, "loss": 2.0}]
    tables.write(tmp_path / "t.csv", rows)
    found = tables.read(tmp_path / "t.csv")
    assert found[0] == {"variant": "U-Net, post-hoc", "seed": 0, "loss": pytest.approx(0.123457)}
    assert found[1]["loss"] == 2


def test_a_run_is_measured_once_and_the_budget_stops_between_runs(tmp_path, monkeypatch):
    trained, now = [], dataclasses.replace(TINY)

    def trains(made: config.Config, *, workdir: pathlib.Path) -> None:
        trained.append(workdir.name)
        workdir.mkdir()
        (workdir / "config.json").write_text(json.dumps(config.to_dict(made)))

    monkeypatch.setattr("dip_jax.jobs.train.train", trains)
    (tmp_path / "work").mkdir()
    made = session.Session(now, out=tmp_path, work=tmp_path / "work", minutes=1.0)
    made.expect(2)

    def quality(workdir):
        return {"loss": len(trained)}

    assert made.run("a", config.Config(), quality) == made.run("a", config.Config(), quality) == {"loss": 1}
    assert trained == ["a"] and json.loads((tmp_path / "work" / "a" / "quality.json").read_text()) == {"loss": 1}
    late = session.Session(now, out=tmp_path, work=tmp_path / "work", minutes=0.0)
    assert late.run("a", config.Config(), quality) == {"loss": 1}  # what is finished costs nothing
    with pytest.raises(Interrupted, match="the budget is over"):
        late.run("b", config.Config(), quality)
    with pytest.raises(UserError):
        tables.read(tmp_path / "none.csv")


@pytest.mark.parametrize(
    ("differences", "said"),
    [
        ([-0.3, -0.31, -0.29], "better"),
        ([0.3, 0.31, 0.29], "worse"),
        ([-0.3, 0.2, 0.0], "cannot be told apart"),
        ([-9.0], "too few seeds"),
    ],
)
def test_an_option_is_better_or_worse_only_where_three_seeds_tell_it_apart(differences, said):
    assert seeds.judge(differences) == said


def test_verdicts_compare_with_plain_of_the_same_seed_and_length():
    rows = [
        {"variant": variant, "seed": seed, "steps": steps, "loss": seed + steps + gain * (steps == 2), "fid_lite0": 1.0}
        for variant, gain in (("plain", 0.0), ("better", -0.5))
        for seed in (0, 1, 2)
        for steps in (1, 2)
    ]
    found = {(row["variant"], row["steps"], row["metric"]): row for row in options.verdicts(rows)}
    assert found["better", 2, "loss"]["verdict"] == "better" and found["better", 2, "loss"]["difference"] == -0.5
    assert found["better", 2, "loss"]["spread"] == 1.0 and found["better", 2, "loss"]["mean"] == 2.5
    assert found["better", 1, "loss"]["verdict"] == "cannot be told apart" == found["better", 2, "fid_lite0"]["verdict"]
    assert found["plain", 1, "loss"]["verdict"] == ""


def test_options_that_differ_in_sampling_alone_share_their_runs():
    names = {name: options.run_name(fields, seed=0) for name, fields in options.VARIANTS.items()}
    assert names["second output, unused"] == names["internal guidance"] and len({*names.values()}) == len(names) - 1
    for fields in options.VARIANTS.values():
        made = options.trained(scale.SCALES["cpu"], fields, seed=1, data="")
        assert made.optim.schedule == "constant" and made.checkpoint.every_steps * 2 == made.train.steps
        for section, values in fields.items():
            if section != "sample":
                assert {key: getattr(getattr(made, section), key) for key in values} == values
