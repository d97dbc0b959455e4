"""The page of the demonstration's seeds is what its rows say."""

from benchmarks.digits import page


def test_the_page_has_the_rows_and_their_mean() -> None:
    rows = [
        {"seed": seed, "before": 10.0, "after": after, "ungated": 98.0, "samples": 450, "gates": 12}
        | {"disagree": 0, "torch": "2.15.0"}
        for seed, after in enumerate((98.0, 99.0, 97.0))
    ]
    told = page(rows)
    assert "| 1 | 10.00 | 99.00 | 98.00 | +1.00 | 0 |" in told
    assert "| mean ± s | | 98.00 ± 1.00 | 98.00 ± 0.00 | +0.00 ± 1.00 | |" in told
    assert "on the 450 held-out images, of which one is 0.22 points" in told
    assert "mean" not in page(rows[:1])
