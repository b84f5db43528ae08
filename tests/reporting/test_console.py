"""Tables and short lines for a terminal."""

import pytest

from dip_jax.reporting import console


def test_a_table_lines_up_and_leaves_blank_what_is_not_there():
    rows = [{"row": "a", "N": 60, "fid": 1234.5678}, {"row": "long name", "N": None, "fid": 0.5, "recall": 1.0}]
    assert console.table(rows) == ["row         N   fid  recall", "a          60  1235", "long name       0.5       1"]


def test_lines_are_aligned_and_empty_ones_left_out():
    assert console.aligned({"a": 1, "seed": 0, "none": None, "empty": "", "longer": 0.25}) == [
        "a       1",
        "seed    0",
        "longer  0.25",
    ]
    assert console.aligned({}) == []


STRANGE = [
    {
        "steps": "many",
        "t_shift": "fast",
        "guidance": "strong",
        "interval": [1],
        "nfe": 250,
        "model": "EDM",
        "step": None,
        "seed": [1, 2],
    },
    {"interval": ["a", "b"], "t_shift": [1], "nfe": {}, "guidance": {"scale": 3}},
    {"anything": {"else": 1}},
]


@pytest.mark.parametrize("settings", STRANGE, ids=["words", "lists", "other keys"])
def test_settings_of_another_program_are_shown_as_far_as_they_are_known(settings):
    lines = console.aligned(console.sampling(settings))
    assert all("\n" not in line for line in lines)
    if settings is STRANGE[0]:
        assert lines == ["solver    many steps, fast", "guidance  strong", "seed      [1, 2]"]
    if settings is STRANGE[2]:
        assert lines == []


PROTOCOL = {"features": "toy", "input": "4x4", "reference": "r.npz", "reference_images": 50, "reference_statistics": "computed"}
PROTOCOL |= {"precision_recall": None, "nearest": None, "border": None}


def test_what_all_rows_share_stands_there_once():
    a, b = {"seed": 1, "solver": "euler"}, {"seed": 2, "solver": "euler"}
    shared = console.behind(PROTOCOL, {"x": a, "y": a})
    assert shared[-2:] == ["solver     euler", "seed       1"] and len(shared) == 4
    assert console.behind(PROTOCOL, {"x": a, "y": b})[-2:] == ["x          euler; 1", "y          euler; 2"]
    assert console.behind(PROTOCOL, {"x": a, "y": {}})[-1] == "x          euler; 1"
    assert len(console.behind(PROTOCOL, {"x": {}, "y": {}})) == 2
