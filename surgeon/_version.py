"""The one place that holds the version; `pyproject.toml` and `surgeon.__version__` read it here."""

__version__ = "0.1.0"
