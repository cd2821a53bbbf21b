"""Log lines as text or as JSON objects; library code only ever asks for a logger and says `event key=%s`.

A JSON line has `ts`, `level`, `logger`, `event`, `message`, the values of the message by their keys under `fields`, and
what is bound: `request_id` and `trace_id` in the code that serves a request, `worker`, `role` and `epoch` of a process.
"""

import logging
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pythonjsonlogger.core import LogData

TEXT_FORMAT = "%(asctime)s %(levelname)s %(name)s %(message)s"
LIFTED = ("request_id", "trace_id")  # of a message's own values
PLAIN = (str, int, float, bool, type(None))

_EVENT = re.compile(r"[a-z][a-z0-9_]*")
_PLACE = re.compile(r"%(?!%)[-#0 +]*\d*(?:\.\d+)?[a-zA-Z]")
_KEYED = re.compile(rf"(\w+)=(?={_PLACE.pattern})")

_bound: ContextVar[Mapping[str, str]] = ContextVar("log_fields", default={})  # noqa: B039 - replaced, never written to

Fields = Callable[[], Mapping[str, object]]


@contextmanager
def bound(**fields: str) -> Iterator[None]:
    """Let every line that this task or thread logs meanwhile carry these fields; empty ones are left out."""
    token = _bound.set({**_bound.get(), **{name: value for name, value in fields.items() if value}})
    try:
        yield
    finally:
        _bound.reset(token)


def nothing() -> Mapping[str, object]:
    """Say nothing of the process."""
    return {}


def configure_logging(level: str, log_format: str, *, of_process: Fields = nothing) -> None:
    """Send logs to stderr at `level`, as text or as one JSON object a line; `of_process` is asked for each line."""
    handler = logging.StreamHandler()
    handler.setFormatter(json_lines(of_process) if log_format == "json" else logging.Formatter(TEXT_FORMAT))
    logging.basicConfig(level=level.upper(), handlers=[handler], force=True)


def json_lines(of_process: Fields = nothing) -> logging.Formatter:
    """Make the formatter of JSON lines."""
    from pythonjsonlogger.json import JsonFormatter

    class JsonLines(JsonFormatter):
        """One object a line, in the fields this module names."""

        def add_fields(self, log_data: "LogData", record: logging.LogRecord, message_dict: "LogData") -> None:
            log_data |= line(record, of_process())
            log_data |= {name: text for name, text in message_dict.items() if name in ("exc_info", "stack_info")}

    return JsonLines()


def line(record: logging.LogRecord, of_process: Mapping[str, object]) -> dict[str, object]:
    """Return the fields of a record, but for its exception."""
    fields = fields_of(record)
    event = _EVENT.match(str(record.msg))
    said: dict[str, object] = {
        "ts": round(record.created, 6),
        "level": record.levelname.lower(),
        "logger": record.name,
        "event": event.group() if event else "",
        "message": record.getMessage(),
        "process": record.process,
        **of_process,
        **{name: fields.pop(name) for name in LIFTED if name in fields},
        **_bound.get(),
    }
    return said | ({"fields": fields} if fields else {})


def fields_of(record: logging.LogRecord) -> dict[str, object]:
    """Return a message's values by their keys, where each has one; numbers stay numbers."""
    template, arguments = str(record.msg), record.args
    keys = _KEYED.findall(template)
    if not isinstance(arguments, tuple) or not len(keys) == len(arguments) == len(_PLACE.findall(template)):
        return {}
    return dict(zip(keys, map(_plain, arguments), strict=True))


def _plain(value: Any) -> object:
    return value if isinstance(value, PLAIN) else str(value)
