"""What is recommended follows from the published table, and says what speaks against it."""

import pytest

from surgeon._recommend import PUBLISHED, SETTINGS, recommend
from surgeon.errors import UsageError


def test_a_published_model_gets_its_published_rate() -> None:
    for one in PUBLISHED:
        if one.setting in ("scratch", "fine-tuning"):
            scratch = one.setting == "scratch"
            found = recommend(f"{one.family}_x", one.millions, images=1_281_167, epochs=30, scratch=scratch)
            assert (found.rate, found.nearest) == (one.rate, one)
            assert one.rate in found.tries
            assert 0.0 in found.tries


def test_the_longest_family_name_counts() -> None:
    assert recommend("convnextv2_tiny", 29, images=10**6, epochs=30).nearest.model == "ConvNeXt V2-tiny"
    assert recommend("convnext_tiny", 29, images=10**6, epochs=30).nearest.model == "ConvNeXt-B"


def test_what_was_assumed_is_told() -> None:
    found = recommend("mystery_net", 300, images=4_000, epochs=120)
    text = str(found)
    assert found.rate == pytest.approx(found.nearest.rate + 0.05)
    for told in (
        "Nothing is published of models named mystery_net",
        "so few images as 4,000",
        "120 epochs",
        "Against it",
    ):
        assert told in text
    assert "Against it" not in str(recommend("resnet50", 25, images=10**6, epochs=90, scratch=True))


def test_the_table_is_sound() -> None:
    assert all(0 <= one.rate < 1 and one.setting in SETTINGS and one.source for one in PUBLISHED)


@pytest.mark.parametrize("wrong", [{"images": 0}, {"epochs": 0}, {"millions": 0.0}])
def test_numbers_out_of_range_are_refused(wrong: dict[str, float]) -> None:
    given = {"millions": 25.0, "images": 10, "epochs": 10, **wrong}
    with pytest.raises(UsageError, match="it has to be above 0"):
        recommend("resnet50", given.pop("millions"), **given)  # type: ignore[arg-type]
