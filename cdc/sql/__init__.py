"""The runtime's queries by name, read from ``queries.sql`` beside this file.

Each begins with a line ``-- name: …``; the comment lines after it say what it is for.
"""

from __future__ import annotations

import re
from importlib.resources import files

_text = files(__name__).joinpath("queries.sql").read_text(encoding="utf-8")
_parts = re.split(r"^-- name: (\w+)\n", _text, flags=re.MULTILINE)

QUERIES: dict[str, str] = {
    name: body.strip().rstrip(";") for name, body in zip(_parts[1::2], _parts[2::2], strict=True)
}
