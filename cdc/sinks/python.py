"""A sink of the user's own: a function, or a subclass of :class:`~cdc.sinks.base.Sink`, named by ``call``.

It is imported when the configuration is read, as any module is: from the packages installed beside cdc, and from
PYTHONPATH. Neither the directory of the configuration nor the working directory is searched, so that nobody runs code
as the daemon who may write a file there and not the configuration. docs/sinks/python.md says how to write one, and how
a package offers a sink under a type of its own.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from importlib import import_module
from typing import Annotated, Any, Literal, NamedTuple, get_args

from pydantic import AfterValidator, Field, ValidationInfo, field_validator

from cdc.encoding import Encoder
from cdc.event import Event
from cdc.options import SinkOptions
from cdc.sinks.base import Sink


class Found(NamedTuple):
    """What was named.

    Attributes:
        sink: a class; None: a function was named.
        function: ``deliver(batch, **options)``.
    """

    sink: type[Sink[Any]] | None
    function: Callable[..., object]


def find(path: str) -> Found:
    """What ``module:name`` stands for.

    Raises:
        ValueError: it cannot be imported, or is no sink.
    """
    module_name, colon, name = path.partition(":")
    if not (colon and all(part.isidentifier() for part in (*module_name.split("."), *name.split(".")))):
        raise ValueError("not a module and a name in it (write shop.hooks:deliver)")
    try:
        found: Any = import_module(module_name)
    except ModuleNotFoundError as error:
        if error.name is None or not f"{module_name}.".startswith(f"{error.name}."):
            raise ValueError(f"{module_name} imports {error.name}, which is not installed (install it)") from None
        raise ValueError(
            f"no module {error.name} (install its package beside cdc, or name its directory in PYTHONPATH)"
        ) from None
    except Exception as error:  # noqa: BLE001  # a module may fail in any way while it is imported
        raise ValueError(f"{module_name} cannot be imported: {_told(error)} (mend it)") from None
    for part in name.split("."):
        found = getattr(found, part, None)
    if found is None:
        raise ValueError(f"{module_name} has no {name} (write the name of a function or of a subclass of Sink in it)")
    return checked(found, name)


def checked(found: object, name: str) -> Found:
    """A class or function, if it can be used as a sink. Raises ValueError."""
    if isinstance(found, type):
        if not issubclass(found, Sink):
            raise ValueError(
                f"{name} is a class and no subclass of cdc.sinks.base.Sink (derive it, or name a function)"
            )
        if inspect.isabstract(found):
            raise ValueError(f"{name} has no deliver() (write one)")
        options = getattr(found, "Options", None)
        if not (isinstance(options, type) and issubclass(options, SinkOptions)):
            raise ValueError(f"{name} has no model of its options (write Options = …, a subclass of SinkOptions)")
        return Found(found, found)
    if not callable(found):
        raise ValueError(f"{name} cannot be called (write the name of a function or of a subclass of Sink)")
    if inspect.iscoroutinefunction(found) or inspect.isgeneratorfunction(found):
        raise ValueError(
            f"{name} is a coroutine or a generator (write a plain function: a batch is delivered when it returns)"
        )
    return Found(None, found)


def _told(error: Exception) -> str:
    """An exception on one line."""
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text}"[:200] if text else type(error).__name__


def _importable(path: str) -> str:
    find(path)
    return path


class PythonOptions(SinkOptions):
    """Options of a ``python`` sink.

    Attributes:
        call: ``module:name`` of a function or of a subclass of `Sink`.
        options: what the function gets as named arguments, or the class as its ``Options``.
    """

    type: Literal["python"]
    call: Annotated[str, AfterValidator(_importable)]
    options: Any = Field(default_factory=dict, validate_default=True, repr=False)

    @field_validator("options")
    @classmethod
    def _fit_what_is_called(cls, value: object, info: ValidationInfo) -> object:
        if not isinstance(value, Mapping):
            raise ValueError("not keys and values (write options: {name: value})")
        if "call" not in info.data:  # it has a finding of its own
            return value
        sink, function = find(info.data["call"])
        if sink is not None:
            return _options_of(sink, value, info.data)
        try:
            inspect.signature(function).bind([], **value)
        except TypeError as error:
            raise ValueError(f"they do not fit the function: {error} (a function takes the batch and these)") from None
        except ValueError:
            pass  # a built-in one that does not tell its arguments
        return dict(value)


def _options_of(sink: type[Sink[Any]], own: Mapping[str, object], shared: Mapping[str, object]) -> SinkOptions:
    """The options of a sink class: what every sink shares, as written beside `call`, and its own."""
    common = {name: shared[name] for name in SinkOptions.model_fields if name in shared}
    if twice := [name for name in own if name in common]:
        raise ValueError(f"{twice[0]} is of every sink (write it beside call)")
    # A class that can also be had under a type of its own says so in its model.
    kinds = get_args(sink.Options.model_fields["type"].annotation)
    return sink.Options.model_validate({**common, "type": kinds[0] if kinds else "python", **own})


class PythonSink(Sink[PythonOptions]):
    """Calls a function with each batch."""

    Options = PythonOptions

    def __init__(self, name: str, options: PythonOptions, encoder: Encoder | None = None) -> None:
        super().__init__(name, options, encoder)
        self._function = find(options.call).function

    @classmethod
    def make(cls, name: str, options: PythonOptions, encoder: Encoder) -> Sink[Any]:
        sink = find(options.call).sink
        return cls(name, options, encoder) if sink is None else sink.make(name, options.options, encoder)

    def deliver(self, batch: Sequence[Event]) -> None:
        self._function(batch, **self.options.options)
