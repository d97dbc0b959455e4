"""The examples in the docstrings of everything public are run as they stand."""

import doctest
import inspect
from pathlib import Path

import pytest

import surgeon

NAMES = sorted(set(surgeon.__all__) - {"SurgeonError", "__version__"})


def _examples(name: str) -> doctest.DocTest:
    text = inspect.getdoc(getattr(surgeon, name)) or ""
    return doctest.DocTestParser().get_doctest(text, {}, f"surgeon.{name}", name, 0)


def _failed(test: doctest.DocTest) -> str:
    said: list[str] = []
    runner = doctest.DocTestRunner(optionflags=doctest.ELLIPSIS)
    runner.run(test, out=said.append)
    return "".join(said)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.filterwarnings("ignore")
def test_the_example_runs(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    test = _examples(name)
    assert test.examples, f"surgeon.{name} has no example"
    assert not any(doctest.SKIP in example.options for example in test.examples)
    assert _failed(test) == ""


def test_an_example_that_is_wrong_fails() -> None:
    test = doctest.DocTestParser().get_doctest(">>> 1 + 1\n3\n", {}, "wrong", "wrong", 0)
    assert "Expected:\n    3\nGot:\n    2" in _failed(test)
