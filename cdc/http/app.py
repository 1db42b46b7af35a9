"""The pages: what each address answers, and who may ask. A WSGI application, so that tests need no socket."""

from __future__ import annotations

import hmac
import ipaddress
import json
import logging
import threading
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from http import HTTPStatus
from importlib import resources
from typing import TYPE_CHECKING, Any
from urllib.parse import parse_qs

from prometheus_client.exposition import choose_encoder

from cdc import diagnosis
from cdc.config import HttpConfig
from cdc.errors import CdcError
from cdc.fleet import Fleet
from cdc.health import troubles
from cdc.http.actions import Actions, NoSuch
from cdc.http.exposition import registry
from cdc.http.overview import history, overview, readiness
from cdc.http.tailing import Tailing

if TYPE_CHECKING:
    from _typeshed.wsgi import StartResponse, WSGIEnvironment

log = logging.getLogger(__name__)

STATUS_FRESH = 2.0
"""Seconds for which an answer of ``/api/status`` serves whoever else asks."""
MOST_BYTES = 64 * 1024
LONGEST_NUMBER = 19
"""Digits of the number of an event."""

HEADERS = (
    (
        "Content-Security-Policy",
        "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; connect-src 'self'; "
        "base-uri 'none'; form-action 'none'; frame-ancestors 'none'; require-trusted-types-for 'script'",
    ),
    ("X-Content-Type-Options", "nosniff"),
    ("X-Frame-Options", "DENY"),
    ("Referrer-Policy", "no-referrer"),
    ("Cross-Origin-Resource-Policy", "same-origin"),
    ("Cross-Origin-Opener-Policy", "same-origin"),
    ("Permissions-Policy", "camera=(), geolocation=(), microphone=()"),
    ("Cache-Control", "no-store"),
)

_STATIC = {
    "/": ("index.html", "text/html; charset=utf-8"),
    "/console.js": ("console.js", "text/javascript; charset=utf-8"),
    "/plots.js": ("plots.js", "text/javascript; charset=utf-8"),
    "/console.css": ("console.css", "text/css; charset=utf-8"),
    "/icon.svg": ("icon.svg", "image/svg+xml"),
}


@dataclass(frozen=True, slots=True)
class Request:
    """What was asked.

    Attributes:
        query: parameters of the address; of one that is repeated, the first.
        body: what came with it, as JSON.
        client: who asks, by address.
    """

    query: Mapping[str, str]
    body: Any
    client: str


@dataclass(frozen=True, slots=True)
class Answer:
    """What is answered."""

    body: bytes
    content_type: str = "application/json"
    status: HTTPStatus = HTTPStatus.OK
    headers: tuple[tuple[str, str], ...] = ()


class Refused(Exception):
    """The answer is no; the text is for the one who asked."""

    def __init__(self, status: HTTPStatus, message: str) -> None:
        super().__init__(message)
        self.status = status


def as_json(value: object, status: HTTPStatus = HTTPStatus.OK) -> Answer:
    """A JSON answer."""
    return Answer(json.dumps(value, ensure_ascii=False, allow_nan=False).encode(), status=status)


def _done(said: str) -> Answer:
    return as_json({"done": said})


class App:
    """The application for one daemon."""

    def __init__(self, fleet: Fleet, config: HttpConfig) -> None:
        """
        Args:
            fleet: what the daemon runs.
            config: the block ``http`` that is in force.
        """
        self._fleet = fleet
        self._config = config
        self._registry = registry(fleet)
        self._tailing = Tailing(fleet, values=config.show_values)
        actions = Actions(fleet, values=config.show_values)
        self._status_lock = threading.Lock()
        self._status: tuple[float, Answer] | None = None
        self._static = {path: (_read(name), kind) for path, (name, kind) in _STATIC.items()}
        self._open: dict[tuple[str, str], Callable[[Request], Answer]] = {
            ("GET", "/healthz"): lambda request: Answer(b"ok\n", "text/plain; charset=utf-8"),
            ("GET", "/readyz"): self._readyz,
            ("GET", "/api/status"): self._api_status,
            ("GET", "/api/overview"): lambda request: as_json(overview(fleet, config)),
            ("GET", "/api/history"): lambda request: as_json(history(fleet)),
        }
        # What may show row values; free to read only where none is shown or no token is configured.
        self._private: dict[tuple[str, str], Callable[[Request], Answer]] = {
            ("GET", "/api/tail"): self._api_tail,
            ("GET", "/api/dead-letters"): lambda request: as_json(actions.letters()),
        }
        self._changing: dict[tuple[str, str], Callable[[Request], Answer]] = {
            ("POST", "/api/token"): lambda request: as_json({"ok": True}),
            ("POST", "/api/sinks/pause"): lambda asked: _done(
                actions.set_paused(asked.body, asked.client, paused=True)
            ),
            ("POST", "/api/sinks/resume"): lambda asked: _done(
                actions.set_paused(asked.body, asked.client, paused=False)
            ),
            ("POST", "/api/backfills/pause"): lambda asked: _done(
                actions.set_backfills_paused(asked.body, asked.client, paused=True)
            ),
            ("POST", "/api/backfills/resume"): lambda asked: _done(
                actions.set_backfills_paused(asked.body, asked.client, paused=False)
            ),
            ("POST", "/api/dead-letters/replay"): lambda asked: _done(actions.replay(asked.body, asked.client)),
            ("POST", "/api/dead-letters/discard"): lambda asked: _done(actions.discard(asked.body, asked.client)),
        }

    def routes(self) -> list[tuple[str, str]]:
        """Every method and path there is, but for the parts of the page."""
        return [("GET", "/"), ("GET", "/metrics"), *self._open, *self._private, *self._changing]

    def close(self) -> None:
        """Stop what runs beside the requests."""
        self._tailing.stop()

    def __call__(self, environ: WSGIEnvironment, start_response: StartResponse) -> Iterable[bytes]:
        """WSGI."""
        method = str(environ["REQUEST_METHOD"])
        try:
            answer = self._answer("GET" if method == "HEAD" else method, environ)
        except Refused as refusal:
            answer = as_json({"error": str(refusal)}, refusal.status)
        except NoSuch as error:
            answer = as_json({"error": str(error)}, HTTPStatus.BAD_REQUEST)
        except CdcError as error:
            answer = as_json({"error": str(error)}, HTTPStatus.SERVICE_UNAVAILABLE)
        except Exception as error:
            log.exception("A page failed as it should not.", extra={"fields": {"path": _path(environ)[:100]}})
            answer = as_json({"error": f"unexpected {type(error).__name__}"}, HTTPStatus.INTERNAL_SERVER_ERROR)
        headers = [
            ("Content-Type", answer.content_type),
            ("Content-Length", str(len(answer.body))),
            *HEADERS,
            *answer.headers,
        ]
        start_response(f"{answer.status.value} {answer.status.phrase}", headers)
        return [b"" if method == "HEAD" else answer.body]

    def _answer(self, method: str, environ: WSGIEnvironment) -> Answer:
        path = _path(environ)
        if self._config.is_loopback and not _is_local(str(environ.get("HTTP_HOST", ""))):
            raise Refused(HTTPStatus.FORBIDDEN, "this host name is not served here (use 127.0.0.1 or localhost)")
        if method == "GET" and path in self._static:
            body, kind = self._static[path]
            return Answer(body, kind)
        if (method, path) == ("GET", "/metrics"):
            return self._metrics(str(environ.get("HTTP_ACCEPT", "")))
        route = (method, path)
        if route in self._open:
            return self._open[route](_request(environ))
        if route in self._private:
            if self._config.show_values and self._config.secret is not None:
                self._check_token(environ)
            return self._private[route](_request(environ))
        if route in self._changing:
            if self._config.secret is None:
                raise Refused(
                    HTTPStatus.FORBIDDEN, "nothing can be changed here without a token (write http.token or token_file)"
                )
            self._check_token(environ)
            return self._changing[route](_request(environ))
        if path in {known for _, known in self.routes()}:
            raise Refused(HTTPStatus.METHOD_NOT_ALLOWED, "not this way")
        raise Refused(HTTPStatus.NOT_FOUND, "there is nothing here")

    def _check_token(self, environ: WSGIEnvironment) -> None:
        """Demand the token, in a header that a page of another site cannot make a browser send."""
        shown = str(environ.get("HTTP_AUTHORIZATION", "")).removeprefix("Bearer ")
        if not hmac.compare_digest(shown.encode("latin-1", "replace"), str(self._config.secret).encode()):
            if shown:
                log.warning("A wrong token was shown.", extra={"fields": {"from": environ.get("REMOTE_ADDR", "?")}})
            raise Refused(HTTPStatus.UNAUTHORIZED, "this needs the token")

    # -- pages --------------------------------------------------------------------------------------------------

    def _metrics(self, accept: str) -> Answer:
        encode, content_type = choose_encoder(accept)
        return Answer(encode(self._registry), content_type)

    def _readyz(self, request: Request) -> Answer:
        found = troubles(self._fleet, self._config.stalled_after)
        return as_json(readiness(self._fleet, found), HTTPStatus.SERVICE_UNAVAILABLE if found else HTTPStatus.OK)

    def _api_status(self, request: Request) -> Answer:
        with self._status_lock:  # so many pages ask, and the databases are asked once
            if self._status is None or time.monotonic() - self._status[0] > STATUS_FRESH:
                databases = self._fleet.databases
                dsns = {name: database.dsn for name, database in databases.items()}
                found = diagnosis.status(self._fleet.config, list(databases), dsns)
                shape = {"databases": {name: database.to_json() for name, database in found.items()}}
                self._status = (time.monotonic(), as_json(shape))
            return self._status[1]

    def _api_tail(self, request: Request) -> Answer:
        after = request.query.get("after")
        if after is not None and not (after.isascii() and after.isdigit() and len(after) <= LONGEST_NUMBER):
            raise Refused(HTTPStatus.BAD_REQUEST, "after is not a number (write the last one that was answered)")
        return as_json(self._tailing.after(None if after is None else int(after)))


def _path(environ: WSGIEnvironment) -> str:
    return str(environ.get("PATH_INFO", "/"))


def _read(name: str) -> bytes:
    return (resources.files("cdc.http") / "static" / name).read_bytes()


def _request(environ: WSGIEnvironment) -> Request:
    query = {name: values[0] for name, values in parse_qs(str(environ.get("QUERY_STRING", ""))).items()}
    body: Any = None
    if environ["REQUEST_METHOD"] == "POST":
        length = str(environ.get("CONTENT_LENGTH") or "0")
        if not length.isdigit() or int(length) > MOST_BYTES:
            raise Refused(HTTPStatus.REQUEST_ENTITY_TOO_LARGE, "too much")
        if str(environ.get("CONTENT_TYPE", "")).partition(";")[0].strip() != "application/json":
            raise Refused(HTTPStatus.UNSUPPORTED_MEDIA_TYPE, "not JSON (send Content-Type: application/json)")
        try:
            body = json.loads(environ["wsgi.input"].read(int(length)) or b"null")
        except (ValueError, RecursionError):
            raise Refused(HTTPStatus.BAD_REQUEST, "not JSON") from None
    return Request(query, body, str(environ.get("REMOTE_ADDR", "?")))


def _is_local(host: str) -> bool:
    """Whether a Host header names this machine and nothing that could be made to point here."""
    name = host.rpartition(":")[0] if host.rpartition(":")[2].isdigit() else host
    if name == "localhost":
        return True
    try:
        return ipaddress.ip_address(name.strip("[]")).is_loopback
    except ValueError:
        return False
