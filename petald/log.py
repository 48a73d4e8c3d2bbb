"""Logging: a fixed event text, and ``key=value`` fields.

    log = get_logger(__name__)
    log.info("span loaded", model=name, blocks="0:10")

Fields of the surroundings (peer, session) come from `log_context`. Values may be from peers, so
control characters are escaped and long values cut. Prompts and hidden states are never logged.
"""

from __future__ import annotations

import json
import logging
import os
import sys
import time
from collections.abc import Iterator, MutableMapping
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, Protocol, TextIO

MAX_VALUE_CHARACTERS = 300

_LIBRARIES = (
    "async_service",
    "asyncio",
    "filelock",
    "httpcore",
    "httpx",
    "huggingface_hub",
    "libp2p",
    "multiaddr",
    "noise",
    "torch",
    "urllib3",
)
_FIELDS = "petald_fields"
_PRIORITIES = {"DEBUG": 7, "INFO": 6, "WARNING": 4, "ERROR": 3, "CRITICAL": 2}

_context: ContextVar[dict[str, object]] = ContextVar("log_context", default={})  # noqa: B039


class LogSettings(Protocol):
    """The part of the configuration that logging takes."""

    @property
    def log_level(self) -> str:
        """``debug``, ``info``, ``warning`` or ``error``."""

    @property
    def log_format(self) -> str:
        """``text`` or ``json``."""


class EventLogger(logging.LoggerAdapter[logging.Logger]):
    """A logger whose keyword arguments are fields."""

    def process(
        self, msg: object, kwargs: MutableMapping[str, Any]
    ) -> tuple[object, MutableMapping[str, Any]]:
        """Gathers the keyword arguments that are not logging's own."""
        own = {
            name: kwargs.pop(name)
            for name in ("exc_info", "stack_info", "stacklevel")
            if name in kwargs
        }
        fields = {**_context.get(), **kwargs}
        return msg, {**own, "extra": {_FIELDS: fields}}


def get_logger(name: str) -> EventLogger:
    """The logger of a module."""
    return EventLogger(logging.getLogger(name), {})


@contextmanager
def log_context(**fields: object) -> Iterator[None]:
    """Adds fields to everything that is logged within, in this task and those it starts."""
    token = _context.set({**_context.get(), **fields})
    try:
        yield
    finally:
        _context.reset(token)


def configure_logging(settings: LogSettings) -> None:
    """Sends the log to standard error, and quietens the libraries."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(JsonFormatter() if settings.log_format == "json" else TextFormatter())
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(settings.log_level.upper())
    for name in _LIBRARIES:
        logging.getLogger(name).setLevel(logging.ERROR)
    logging.captureWarnings(capture=True)
    logging.getLogger("py.warnings").setLevel(logging.ERROR)


def format_value(value: object) -> str:
    """A field's value on one line: quoted where it has spaces, cut where it is long."""
    text = _cut(str(value))
    if text and text.isprintable() and not any(mark in text for mark in ' "=\\'):
        return text
    return json.dumps(text, ensure_ascii=not text.isprintable())


class TextFormatter(logging.Formatter):
    """One line an event; under journald, which keeps the time itself, with a priority."""

    def __init__(self) -> None:
        super().__init__()
        self._is_journal = _is_journal(sys.stderr)

    def format(self, record: logging.LogRecord) -> str:
        """The line."""
        if self._is_journal:
            head = f"<{_PRIORITIES.get(record.levelname, 6)}>"
        else:
            moment = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(record.created))
            head = f"{moment}.{int(record.msecs):03d} {record.levelname.lower():7} "
        parts = [_escape(record.getMessage())]
        fields: dict[str, object] = getattr(record, _FIELDS, {})
        parts += [f"{name}={format_value(value)}" for name, value in fields.items()]
        if record.exc_info:
            parts.append(f"traceback={json.dumps(self.formatException(record.exc_info))}")
        return head + " ".join(parts)


class JsonFormatter(logging.Formatter):
    """One JSON object an event."""

    def format(self, record: logging.LogRecord) -> str:
        """The object."""
        fields: dict[str, object] = getattr(record, _FIELDS, {})
        entry: dict[str, object] = {
            "time": round(record.created, 3),
            "level": record.levelname.lower(),
            "logger": record.name,
            "event": record.getMessage(),
        }
        entry |= {
            name: value if isinstance(value, int | float | bool) else _cut(str(value))
            for name, value in fields.items()
            if name not in entry
        }
        if record.exc_info:
            entry["traceback"] = self.formatException(record.exc_info)
        return json.dumps(entry)


def _is_journal(stream: TextIO) -> bool:
    """Whether what is written there goes to journald: systemd.exec(5), ``$JOURNAL_STREAM``."""
    try:
        status = os.fstat(stream.fileno())
    except (OSError, ValueError):
        return False
    return os.environ.get("JOURNAL_STREAM") == f"{status.st_dev}:{status.st_ino}"


def _cut(text: str) -> str:
    if len(text) <= MAX_VALUE_CHARACTERS:
        return text
    return f"{text[:MAX_VALUE_CHARACTERS]}... ({len(text)} characters)"


def _escape(text: str) -> str:
    return text if text.isprintable() else json.dumps(text)[1:-1]
