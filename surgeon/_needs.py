"""Packages that one feature needs and the rest of surgeon does not."""

import re
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec

from surgeon.errors import MissingPackageError

_IMPORTED_AS = {"onnx-ir": "onnx_ir"}
RUNS_ONNX = ("onnx", "onnx-ir", "onnxruntime")
EXPORTS = (*RUNS_ONNX, "onnxscript>=0.7.2")  # older versions leave control flow in plain graphs


def need(what: str, *packages: str) -> None:
    """Checks that packages are installed, before ``what`` begins to work.

    Args:
        what: What needs them, with which the message begins.
        packages: Their names in the package index, with the oldest version where that matters
            (``"onnxscript>=0.7.2"``). A package of another name that brings the same module will do.

    Raises:
        MissingPackageError: One is not installed or too old; the message has the line that installs all.
    """
    wrong = [package for package in packages if _wrong(package)]
    if wrong:
        told = " and ".join(f"{package.replace('>=', ' from ')} ({_wrong(package)})" for package in wrong)
        quoted = " ".join(f"'{package}'" if ">" in package else package for package in wrong)
        raise MissingPackageError(f"{what} needs {told}: pip install {quoted}")


def need_export(what: str) -> None:
    """Checks that an ONNX file can be made here, before ``what`` begins to work.

    Raises:
        MissingPackageError: As in `need`.
        UnsupportedTorchError: The exporter of this version of PyTorch will not do.
    """
    from surgeon._torch import check_exporter

    need(what, *EXPORTS)
    check_exporter(what)


def installed(name: str) -> str | None:
    """The version of a package, or None where it is not installed."""
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def _wrong(package: str) -> str:
    """What is wrong with an installed package; nothing if it will do."""
    name, _, oldest = package.partition(">=")
    if find_spec(_IMPORTED_AS.get(name, name)) is None:
        return "not installed"
    found = installed(name)
    return f"{found} is installed" if found and oldest and _number(found) < _number(oldest) else ""


def _number(text: str) -> list[int]:
    return [int(part) for part in re.match(r"[\d.]*", text)[0].split(".") if part]  # type: ignore[index]
