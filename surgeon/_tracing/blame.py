"""Whose fault an exception is: the forward's that was looked at, or surgeon's own.

A forward may raise anything, and that is an answer. A name of PyTorch's that is gone is none: it must not
read as "this block has no residual add".
"""

from pathlib import Path
from types import TracebackType

from surgeon._torch import NUMBERS_ASKED

_HOUSE = Path(__file__).resolve().parents[1]
# Proxies answer for the values behind them, also that a value has no such attribute.
_ANSWERS = {"proxy.py"}


def is_internal(error: BaseException) -> bool:
    """Whether surgeon's own code asked for a name that is not there."""
    return isinstance(error, (AttributeError, NameError, ImportError)) and _is_ours(error.__traceback__)


def _is_ours(trace: TracebackType | None) -> bool:
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    path = Path(trace.tb_frame.f_code.co_filename) if trace is not None else Path()
    return path.is_relative_to(_HOUSE) and path.name not in _ANSWERS


def asks_numbers(error: BaseException) -> bool:
    """Whether code wanted to know the numbers in a tensor, which a fake one has not."""
    return isinstance(error, NUMBERS_ASKED)
