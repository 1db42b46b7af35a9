"""What a sink is: one small class in one file, with the model of its configuration beside it.

A sink is opened once, is given batches in order, one at a time and from one thread, and is closed once. It returns
from :meth:`Sink.deliver` only when the destination has the events for good; what it cannot deliver it raises as

* :class:`~cdc.errors.TransientFailure`: try the same events again later,
* :class:`~cdc.errors.PermanentFailure`: never try again (the pipeline finds out which event of a batch it was),
* :class:`~cdc.errors.PartialFailure`: these of the batch failed, each for its own reason; the rest is delivered,
* :class:`~cdc.errors.SinkDisabled`: somebody has to step in.

Any other exception counts as transient: a bug must not lose an event. Retrying, dead letters, filters, positions and
order are the pipeline's business.

An event known beforehand to be refused (too large, a name that cannot be made) is raised before anything is sent:
the pipeline halves the batch until it has found it, and nothing of its key overtakes it.

A sink that speaks through a client library names its modules in :attr:`Sink.clients` and gets them by :func:`require`:
who does not use the sink needs no library, and who has forgotten it is told its name.

A sink that can store with the events how far it has come, and so take each exactly once, sets
:attr:`Sink.keeps_position` and is told by :meth:`Sink.begin` where in the book it is.
"""

from __future__ import annotations

import os
import socket
import ssl
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import import_module
from typing import Any, ClassVar, Generic, NoReturn, TypeVar

from cdc.encoding import Encoder
from cdc.errors import SinkDisabled, TransientFailure
from cdc.event import Event
from cdc.options import SinkOptions, TlsOptions

OptionsT = TypeVar("OptionsT", bound=SinkOptions)


@dataclass(frozen=True, slots=True)
class Page:
    """Where in the book of its database a pipeline stands.

    Attributes:
        database: the database's name in the configuration.
        window: of which window the next events are. Read again after a crash they are of the same one; rewound to, of
            another. None: no window is open.
        after: seq up to which that window was acknowledged.
    """

    database: str
    window: str | None
    after: int


class Sink(ABC, Generic[OptionsT]):
    """Base of every sink.

    Attributes:
        Options: the model of its configuration.
        clients: modules of other projects that it needs; the extra of the distribution that brings them has the name of
            the sink's type.
        keeps_position: whether it wants to be told by :meth:`begin` where in the book it is.
        name, options, encoder: as given to it.
    """

    Options: ClassVar[type[SinkOptions]]
    clients: ClassVar[tuple[str, ...]] = ()
    keeps_position: ClassVar[bool] = False

    def __init__(self, name: str, options: OptionsT, encoder: Encoder | None = None) -> None:
        """
        Args:
            name: the sink's name in the configuration.
            options: its validated configuration.
            encoder: the sink's format; the native one by default.
        """
        self.name = name
        self.options = options
        self.encoder = encoder or Encoder()

    @classmethod
    def make(cls, name: str, options: Any, encoder: Encoder) -> Sink[Any]:
        """A new, unopened sink for these options; one of another class where the options say so."""
        return cls(name, options, encoder)

    def begin(self, page: Page) -> None:
        """Take note of what comes next: called before :meth:`open`, once nobody else serves the sink, and then before
        the first delivery of each page. Called only if :attr:`keeps_position`.
        """
        return

    def open(self) -> None:
        """Get ready. Called before the first batch, and again after :meth:`close`.

        Raises:
            DeliveryError: as in :meth:`deliver`.
        """
        return

    @abstractmethod
    def deliver(self, batch: Sequence[Event]) -> None:
        """Hand over a batch, in this order; return when the destination has it for good.

        Raises:
            TransientFailure, PermanentFailure, PartialFailure, SinkDisabled: see the head of this module.
        """

    def close(self) -> None:
        """Let go of everything; harmless when called twice or before :meth:`open`."""
        return


def require(module: str, *, extra: str) -> Any:
    """A client library, imported when it is first used; SinkDisabled, with the cure, is raised then if it is missing.

    At the head of a sink's module, so that types stay known::

        if TYPE_CHECKING:
            import redis
        else:
            redis = require("redis", extra="redis")

    Args:
        module: its full name; a submodule that its package does not import needs a line of its own.
        extra: of this distribution, that brings it: the sink's type.
    """
    return _Client(module, extra)


def how_to_get(extra: str) -> str:
    """The cure for a missing client library."""
    return f"pip install 'table-cdc[{extra}]'"


class _Client:
    """Stands for a module until something of it is used."""

    def __init__(self, module: str, extra: str) -> None:
        self._module = module
        self._extra = extra

    def __getattr__(self, name: str) -> Any:
        try:
            module = import_module(self._module)
        except ImportError:
            cure = how_to_get(self._extra)
            raise SinkDisabled(f"the client library {self._module} cannot be imported ({cure})") from None
        found = self.__dict__[name] = getattr(module, name)
        return found


# -- what sinks share ---------------------------------------------------------------------------------------------


def tls_context(options: TlsOptions) -> ssl.SSLContext:
    """What TLS options say, for a client's connection. Raises TransientFailure: a file cannot be used."""
    key = "ca"
    try:
        context = ssl.create_default_context(cafile=options.ca)
        key = "certificate"
        if options.certificate is not None:
            context.load_cert_chain(options.certificate, options.key, password=_no_passphrase)
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) and not isinstance(error, ssl.SSLError) else None
        raise TransientFailure(f"tls.{key} cannot be used: {reason or 'not what it should be, in PEM'}") from None
    if not options.verify:
        context.check_hostname = False
        context.verify_mode = ssl.CERT_NONE
    return context


def network_reason(error: OSError) -> str:
    """Why there is no connection, in the system's words, or in those of the TLS library or the resolver."""
    if isinstance(error, ssl.SSLError | socket.gaierror) or not error.errno:
        return error.strerror or str(error)
    return os.strerror(error.errno)  # asyncio writes something of its own into the error


def _no_passphrase() -> NoReturn:
    # Without this OpenSSL asks on the terminal, and waits.
    raise ValueError("the key has a passphrase")
