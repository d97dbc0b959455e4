"""The latency benchmark: what it measures on a small model, and the page it writes."""

import json

import numpy as np
import pytest

from benchmarks import inference

ROW = {
    "model": "some_net",
    "size": 64,
    "batch": 2,
    "rounds": 9,
    "nodes": {"ungated": 10, "folded": 10, "naive": 12},
    "ms": {"ungated": 2.5},
    "ratio": {"folded": [0.99, 1.0, 1.01], "naive": [1.0, 1.1, 1.2], "again": [0.9, 1.0, 1.1]},
}


def test_page():
    line = inference.page([ROW]).splitlines()[-1]
    assert line == (
        "| some_net | 2 x 64 px, 9 rounds | 10 / 10 / 12 | 2.5 ms | 1.000 (0.990 to 1.010) "
        "| 1.100 (1.000 to 1.200) | 1.000 (0.900 to 1.100) |"
    )


def test_the_last_row_of_a_model_counts(tmp_path):
    rows = tmp_path / "rows.jsonl"
    assert inference.read(rows) == []
    rows.write_text("".join(json.dumps(ROW | {"rounds": rounds}) + "\n" for rounds in (1, 2)))
    assert [row["rounds"] for row in inference.read(rows)] == [2]


@pytest.mark.slow
def test_measures_three_files():
    row = inference.measure("test_resnet", 8, 1)
    assert row["nodes"]["folded"] == row["nodes"]["ungated"] == row["nodes"]["naive"] - 4
    assert set(row["ratio"]) == {"folded", "naive", "again"}
    for quartiles in row["ratio"].values():
        assert np.isfinite(quartiles).all()
        assert quartiles == sorted(quartiles)
