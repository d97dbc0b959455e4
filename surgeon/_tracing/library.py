"""Which code is a library's, whose state is its own affair, and which the user's."""

import sys

_LIBRARIES = sys.stdlib_module_names | {"torch", "numpy", "sympy", "surgeon"}


def is_library(module: str | None) -> bool:
    """Whether a module of that name is Python's, PyTorch's or surgeon's own."""
    return (module or "torch").split(".")[0] in _LIBRARIES
