"""From a YAML file to strict, frozen models, or to every reason why not.

`find` says which file, `load` reads it. Four steps, a module each; every one adds to the same list of findings,
which is raised as a whole:

1. **Read** (`reading`). UTF-8, at most 256 KiB, one YAML 1.2 document, no duplicate keys, anchors, aliases or
   tags; every key keeps its line. What leaves no tree to speak of (syntax, nesting, a second document) ends the
   work here.
2. **Expand** (`variables`) ``${NAME}`` and ``${NAME:-default}`` in text values, never in keys, once, after
   parsing: what a variable holds is always text and can add neither keys nor structure.
3. **Validate** (`validation`) with pydantic against `models`. A sink is read by the model its ``type`` names in
   the registry the caller hands in; one whose type is unknown still has its shared fields checked.
4. **Cross-check** (`crosscheck`) what no single model sees: databases named by sinks, one table written in two
   ways.

Findings (`findings`, worded with `words`) come in the order of the file and read ``FILE: path.to.key: what is
wrong (what would be right)``. They never contain a value: any value may be a secret, or have come from
``${SECRET}``. Three exceptions: keys, unless they look like a connection string, the name of a ``dsn_file``, and the
module and name that ``call`` stands for.
A place that already has a finding of step 1 or 2 gets no second one from step 3. Of a connection string
(`cdc.dsn`) only the address is ever shown.

Beside the steps, `literals` says where secrets stand in the file itself, for `cdc check`.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Final

from cdc.config.crosscheck import cross_check
from cdc.config.findings import Findings, shown
from cdc.config.literals import literal_secrets
from cdc.config.models import Config, DatabaseConfig, HttpConfig, LogConfig, Name, TableConfig
from cdc.config.reading import MAX_BYTES, MAX_DEPTH, Unreadable, read
from cdc.config.validation import validate
from cdc.config.variables import expand
from cdc.dsn import Dsn, DsnFile
from cdc.errors import ConfigError
from cdc.options import SinkOptions

__all__ = [
    "LOCAL_CONFIG",
    "MAX_BYTES",
    "MAX_DEPTH",
    "SYSTEM_CONFIG",
    "Config",
    "DatabaseConfig",
    "Dsn",
    "DsnFile",
    "HttpConfig",
    "LogConfig",
    "Name",
    "TableConfig",
    "find",
    "literal_secrets",
    "load",
    "shown",
]

LOCAL_CONFIG: Final = Path("config.yaml")
SYSTEM_CONFIG: Final = Path("/etc/cdc/config.yaml")


def find(explicit: Path | None, environ: Mapping[str, str]) -> Path:
    """Which configuration file to read: ``-c``, ``$CDC_CONFIG``, ``./config.yaml``, ``/etc/cdc/config.yaml``.

    A file that was asked for by name is returned whether it exists or not; `load` says what is wrong with it.

    Args:
        explicit: what the user gave as ``-c``.
        environ: the process environment; an empty ``CDC_CONFIG`` counts as unset.

    Raises:
        ConfigError: nothing was asked for and neither default exists.
    """
    if explicit is not None:
        return explicit
    if environ.get("CDC_CONFIG"):
        return Path(environ["CDC_CONFIG"])
    for candidate in (LOCAL_CONFIG, SYSTEM_CONFIG):
        try:
            candidate.stat()
        except (FileNotFoundError, NotADirectoryError):
            continue
        except OSError:
            # It is there, or may be, behind a directory we may not enter. Going on to the next file would run
            # the daemon with a configuration nobody meant; load() reports the reason.
            pass
        return candidate
    raise ConfigError(
        [
            f"{LOCAL_CONFIG}: no configuration file; looked for -c FILE, $CDC_CONFIG, ./{LOCAL_CONFIG} and "
            f"{SYSTEM_CONFIG} (copy config.example.yaml to ./{LOCAL_CONFIG} and set its dsn)"
        ]
    )


def load(path: Path, sink_types: Mapping[str, type[SinkOptions]], environ: Mapping[str, str]) -> Config:
    """Read a configuration file, and the files its ``dsn_file`` keys name.

    Args:
        path: the YAML file.
        sink_types: sink type → its model; the sinks this program has.
        environ: where ``${NAME}`` is looked up.

    Raises:
        ConfigError: every finding at once, in the order of the file; no value of the file is in it.
    """
    findings = Findings()
    config = None
    try:
        data = expand(read(path, findings), environ, findings)
    except Unreadable as reason:
        findings.add((), str(reason), place=reason.place)
    else:
        # Before validation: of two findings in one place, the one cross-checking made comes first.
        cross_check(data, findings)
        config = validate(data, sink_types, findings)
    found = findings.in_order()
    if config is None or found:
        # Outside any except block: a chained ValidationError would carry the values it complains about.
        raise ConfigError([f"{path}: {text}" for text in found])
    return config
