"""Connection strings: what may be written as one, the file that may hold one, and what of it may be shown."""

from __future__ import annotations

import re
import stat
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Final
from urllib.parse import unquote

from pydantic import AfterValidator, SecretStr, ValidationInfo

# A DSN file holds one line; anything larger is another file.
_MAX_FILE_BYTES: Final = 64 * 1024

_KEYWORD: Final = re.compile(
    r"\s*([A-Za-z_]+)\s*=\s*(?:'((?:[^'\\]|\\.)*)'(?=\s|\Z)|((?!')(?:[^\s\\]|\\.)*))", re.DOTALL
)
_URL_HOST: Final = re.compile(r"([\w.%-]*|\[[\w:.%]+\])(?::([0-9]*))?", re.ASCII)
_BAD_PERCENT: Final = re.compile(r"%(?![0-9A-Fa-f]{2})")

# The parts of a connection string that are no secret, in the order they are shown.
_PUBLIC_PARTS: Final = ("service", "host", "hostaddr", "port", "dbname")

_ENCODE: Final = "percent-encode what is special in the user name and password: @ is %40, / is %2F, ? is %3F"


def _parts(dsn: str) -> dict[str, str]:
    """The keywords of a connection string, read as libpq reads it; of a URL only the `_PUBLIC_PARTS`.

    Stricter than libpq wherever a slip in the password would turn a piece of it into a host or database name,
    because those names are logged.

    Raises:
        ValueError: neither a libpq URL, nor key=value, nor ``embedded:DIR``; the message holds nothing of it.
    """
    if "\x00" in dsn:
        raise ValueError("contains a NUL character (remove it)")
    if dsn.startswith("embedded:"):
        directory = dsn.removeprefix("embedded:")
        if not directory.strip():
            raise ValueError("embedded: without a directory (write embedded:./data)")
        return {"embedded": directory}
    scheme, found, rest = dsn.partition("://")
    parts = _url_parts(rest) if found and scheme in ("postgresql", "postgres") else _keyword_parts(dsn)
    if "@" in parts.get("host", "")[1:]:
        raise ValueError("a host that contains @ (write user and password as keywords of their own)")
    # `host= password=x` makes password=x the host, and a dbname may be a connection string of its own.
    for name in _PUBLIC_PARTS:
        if re.search(r"=|://", parts.get(name, "")):
            raise ValueError(f"a {name} that contains = or :// (write '' for an empty value)")
    return parts


def _url_parts(rest: str) -> dict[str, str]:
    if re.search(r"\s", rest) or _BAD_PERCENT.search(rest):
        raise ValueError(f"not a valid URL ({_ENCODE}, % is %25)")
    # libpq looks for the user before anything else: up to the first @, unless a / comes first.
    user = re.match(r"[^@/]*@", rest)
    if user:
        rest = rest[user.end() :]
    location, _, query = rest.partition("?")
    hosts, _, dbname = location.partition("/")
    found = [_URL_HOST.fullmatch(host) for host in hosts.split(",")]
    if (user and "?" in user[0]) or "@" in location or not all(found):
        raise ValueError(f"not a valid URL ({_ENCODE})")
    ports = [host[2] or "" for host in found if host]
    parts = {
        "host": ",".join(host[1].strip("[]") for host in found if host),
        "port": ",".join(ports) if any(ports) else "",
        "dbname": dbname,
    }
    for parameter in filter(None, query.split("&")):
        name, found_equals, value = parameter.partition("=")
        if not found_equals or "=" in value:
            raise ValueError("not a valid URL (write its parameters as ?name=value&name=value)")
        if unquote(name) in _PUBLIC_PARTS:
            parts[unquote(name)] = value
    return {name: unquote(value) for name, value in parts.items() if value}


def _keyword_parts(dsn: str) -> dict[str, str]:
    parts: dict[str, str] = {}
    dsn = dsn.strip()
    at = 0
    while at < len(dsn) or not parts:
        found = _KEYWORD.match(dsn, at)
        if found is None:
            raise ValueError(
                "not a connection string (write postgresql://user@host/dbname, host=… dbname=…, or embedded:DIR)"
            )
        at = found.end()
        parts[found[1]] = re.sub(r"\\(.)", r"\1", found[2] or found[3] or "", flags=re.DOTALL)
    return parts


def _checked_dsn(dsn: SecretStr) -> SecretStr:
    _parts(dsn.get_secret_value())
    return dsn


Dsn = Annotated[SecretStr, AfterValidator(_checked_dsn)]
"""A libpq URL, a libpq key=value string, or ``embedded:DIR``; never shown."""


def _leads_away(dsn: SecretStr) -> SecretStr:
    if dsn.get_secret_value().startswith("embedded:"):
        raise ValueError("embedded: is for source databases (write a libpq URL, or key=value)")
    return dsn


ServerDsn = Annotated[Dsn, AfterValidator(_leads_away)]
"""A `Dsn` that names a server."""


@dataclass(frozen=True)
class DsnFile:
    """A file that holds a connection string, and the one it held when the configuration was read."""

    path: str
    dsn: SecretStr


def read_dsn_file(value: object) -> object:
    """Read the file a ``dsn_file`` names; a relative name counts from the working directory.

    What is not text is handed back as it is: validation says what it should be.

    Raises:
        ValueError: the file cannot be used; the message may name it, but holds nothing of its content.
    """
    if not isinstance(value, str):
        return value
    dsn = read_secret(value, "connection string", "dsn")
    try:
        _parts(dsn)
    except ValueError as error:
        raise ValueError(f"content of {printable(value)}: {error}") from None
    return DsnFile(value, SecretStr(dsn))


def read_secret(value: str, what: str, key: str) -> str:
    """The one line of a file that holds a secret and that not everybody may read.

    Args:
        value: the name of the file; a relative one counts from the working directory.
        what: what the file holds, in words.
        key: the key that takes the secret itself.

    Raises:
        ValueError: the file cannot be used; the message may name it, but holds nothing of its content.
    """
    path, name = Path(value), printable(value)
    try:
        mode = path.stat().st_mode
        # stat() first: opening a FIFO would wait for a writer that may never come.
        if not stat.S_ISREG(mode):
            raise ValueError(f"{name} is not a regular file (write the name of a file)")
        if mode & stat.S_IROTH:
            raise ValueError(f"{name} can be read by everybody (chmod o-r {name})")
        with path.open("rb") as file:
            content = file.read(_MAX_FILE_BYTES + 1)
    except OSError as error:
        if re.search("[=:]", value):
            # Somebody may have put the secret itself here, and it must not be shown.
            message = f"no such file, and it looks like a {what} (write that as {key})"
        else:
            reason = error.strerror or "unknown reason"
            message = f"cannot read {name}: {reason} (name a file this user may read)"
        raise ValueError(message) from None
    if len(content) > _MAX_FILE_BYTES:
        raise ValueError(f"{name} is too large (it should hold one {what} and nothing else)")
    try:
        secret = content.decode().strip()
    except UnicodeDecodeError:
        raise ValueError(f"{name} is not UTF-8 text (it should hold one {what})") from None
    if not secret:
        raise ValueError(f"{name} is empty (it should hold one {what})")
    return secret


def either(file: DsnFile | None, info: ValidationInfo) -> DsnFile | None:
    """Validate a field ``dsn_file`` that stands behind ``dsn``, None being the default of each: one has to be there.

    Raises:
        ValueError: neither is, or both are.
    """
    if "dsn" in info.data:  # otherwise it is there, and wrong, and has a finding of its own
        if file is None and info.data["dsn"] is None:
            raise ValueError("no connection string (write dsn or dsn_file)")
        if file is not None and info.data["dsn"] is not None:
            raise ValueError("given beside dsn (keep one of the two)")
    return file


def resolved(dsn: SecretStr | None, file: DsnFile | None) -> SecretStr:
    """The connection string, whichever of the two fields holds it."""
    found = file.dsn if file else dsn
    if found is None:  # only model_construct() gets here
        raise ValueError("no connection string")
    return found


def describe(dsn: SecretStr) -> str:
    """Where a connection string leads, fit for logs: ``host=db1 port=5433 dbname=shop`` or ``embedded:DIR``.

    Users, passwords and every other parameter are left out.

    Raises:
        ValueError: not a connection string.
    """
    parts = _parts(dsn.get_secret_value())
    if "embedded" in parts:
        return printable(f"embedded:{parts['embedded']}")
    shown = (f"{name}={printable(parts[name])}" for name in _PUBLIC_PARTS if parts.get(name))
    return " ".join(shown) or "libpq's default server"


def printable(text: str) -> str:
    """A key or a file name on one line; a connection string in the wrong place is not shown at all."""
    if re.search(r"://[^/]*@|pass(word|file)?\s*=", text):
        return "***"
    if not text:
        return '""'
    shown = "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)
    return shown if len(shown) <= 120 else f"{shown[:119]}…"
