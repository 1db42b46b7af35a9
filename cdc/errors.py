"""Every error cdc raises on purpose, drawn once.

CdcError
├── ConfigError            the YAML is wrong; every finding at once
├── InstallError           a database could not be migrated; nothing was changed there
├── EmbeddedError          the private PostgreSQL could not be started
├── DatabaseError          a database call failed
│   ├── DatabaseUnreachable    no connection, a lost one, or no answer in time; a new connection may heal it
│   ├── NotPrimary             connected, but to a standby
│   ├── TooSlow                the server is alive and did not finish in the time given
│   ├── Undecodable            the answer holds bytes that are no characters
│   ├── WrongCluster           a position was taken in another cluster and says nothing here
│   ├── NotInstalled           connected, but the cdc schema is missing or of another revision
│   └── Fenced                 another daemon has taken this pipeline over
└── DeliveryError          a sink could not take an event
    ├── TransientFailure       worth retrying
    ├── PermanentFailure       never worth retrying; the failure policy decides
    ├── PartialFailure         some events of the batch failed, the others are delivered
    └── SinkDisabled           the sink will take nothing more until somebody steps in
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence


class CdcError(Exception):
    """Base of all errors cdc raises on purpose; ``str(error)`` is fit for a user's eyes and holds no secret."""


class ConfigError(CdcError):
    """The configuration is wrong.

    Attributes:
        findings: one line each, ``FILE: path.to.key: what is wrong (what would be right)``.
    """

    def __init__(self, findings: Sequence[str]) -> None:
        self.findings = tuple(findings)
        super().__init__("\n".join(self.findings))


class InstallError(CdcError):
    """A database could not be migrated; its transaction was rolled back."""


class EmbeddedError(CdcError):
    """The embedded PostgreSQL could not be installed, initialised or started."""


class DatabaseError(CdcError):
    """A database call failed for a reason a new connection will not mend.

    Attributes:
        sqlstate: the server's code for it; empty when the server has said nothing.
    """

    sqlstate = ""


class DatabaseUnreachable(DatabaseError):
    """No connection, a lost connection, or no answer before the deadline."""


class NotPrimary(DatabaseError):
    """The server is a standby: it can neither LISTEN nor store a position."""


class NotInstalled(DatabaseError):
    """The schema ``cdc`` is missing or of another revision than this program."""


class TooSlow(DatabaseError):
    """The server did not finish in the time given; it is alive, and the session goes on."""


class Undecodable(DatabaseError):
    """The answer holds bytes that are no characters, or characters that UTF-8 has not; the session goes on."""


class WrongCluster(DatabaseError):
    """A sink's position was taken in another cluster, whose transaction ids say nothing here."""


class Fenced(DatabaseError):
    """Another daemon owns this pipeline now; this one must not acknowledge anything more."""


class DeliveryError(CdcError):
    """A sink could not take one or more events."""


class TransientFailure(DeliveryError):
    """Worth retrying: the sink is down, slow or full.

    Attributes:
        retry_after: seconds the sink asked us to wait, or None.
    """

    def __init__(self, message: str, *, retry_after: float | None = None) -> None:
        super().__init__(message)
        self.retry_after = retry_after


class PermanentFailure(DeliveryError):
    """Never worth retrying with the same event: the failure policy decides what becomes of it."""


class PartialFailure(DeliveryError):
    """Some events of a batch failed; those not named were delivered.

    Attributes:
        failures: index into the delivered sequence → why that event failed.
    """

    def __init__(self, failures: Mapping[int, TransientFailure | PermanentFailure]) -> None:
        self.failures = dict(failures)
        super().__init__(f"{len(self.failures)} event(s) of the batch failed")


class SinkDisabled(DeliveryError):
    """The sink will take nothing more until somebody steps in (a closed pipe, HTTP 410)."""
