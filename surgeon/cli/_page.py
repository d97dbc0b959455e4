"""A plan as one page of HTML that needs nothing else: no network, no other file."""

import json
from pathlib import Path
from typing import Any

_TEMPLATE = Path(__file__).with_name("page.html")


def page(found: dict[str, Any]) -> str:
    """The page of a plan, as `surgeon inspect --json` gives it."""
    data = json.dumps(found, default=str).replace("<", "\\u003c")  # so that no text ends the script
    return _TEMPLATE.read_text(encoding="utf-8").replace("{{DATA}}", data)
