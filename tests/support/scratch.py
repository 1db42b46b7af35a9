"""Where the tests' servers keep their data."""

from __future__ import annotations

import os
import shutil
import tempfile
from pathlib import Path

_MEMORY = Path("/dev/shm")  # noqa: S108  # made anew under a name of its own, as in /tmp
_ROOM = 4 << 30
"""Bytes that have to be free there: a container's is often 64 MiB in all."""


def scratch(prefix: str) -> Path:
    """A new directory for a server's data, in memory if there is room: every test makes a database, of 300 files.

    Not pytest's own temporary directory: that is closed to the user who runs PostgreSQL in root's stead.
    """
    roomy = os.access(_MEMORY, os.W_OK) and shutil.disk_usage(_MEMORY).free >= _ROOM
    return Path(tempfile.mkdtemp(prefix=prefix, dir=_MEMORY if roomy else None)).resolve()
