"""Logs of both processes: one line an event, key=value, and a number that follows one system call across them.

    time=2026-11-23T17:45:56.123Z level=info logger=memfs.fuse.requests msg=fallocate request=412 ino=3 mode=3 ...
    time=2026-11-23T17:45:56.124Z level=info logger=memfs.owners.registry msg=notify request=412 owner=1 ...
    time=2026-11-23T17:45:56.124Z level=info logger=kvmsim.backing msg=notified request=412 ...

`request` is the number that the kernel gave the FUSE request (`unique`); a notification carries it to the owner.
Requests that pyfuse3 answers do not show it, so they get numbers of ours, from 2**63 on. It is a context variable, so
that code which works on a request, in whichever task, need not pass it on.

A value with anything but plain characters is quoted as JSON is, so that no name that a client gives itself can look
like a line or a field of its own; a traceback is one such value. Warnings and errors may be lines that a client
can bring about as often as it likes, so they are limited per place in the code, as the kernel's are
(printk_ratelimited()); the next line that is written says how many were suppressed.
"""

from __future__ import annotations

import itertools
import json
import logging
import re
import time
from contextvars import ContextVar
from typing import Any, Final

_PLAIN: Final = re.compile(r"[A-Za-z0-9_.:/@+,\[\]()%-]+")
_FIELDS: Final = "fields"  # the attribute of a log record that holds them
_BURST, _INTERVAL = 10, 5.0  # lines, seconds: printk_ratelimit and printk_ratelimit_burst

_request: ContextVar[int] = ContextVar("request", default=0)
_ours: Final = itertools.count(1 << 63)


def current_request() -> int:
    """Return the number of the request that is being worked on; 0 if none is."""
    return _request.get()


class working_on:
    """The request that is worked on within the block, and in tasks that it starts. None: one with a number of ours."""

    __slots__ = ("_token", "_unique")

    def __init__(self, unique: int | None = None) -> None:
        self._unique: Final = next(_ours) if unique is None else unique

    def __enter__(self) -> None:
        self._token = _request.set(self._unique)

    def __exit__(self, *_: object) -> None:
        _request.reset(self._token)


def fields(**values: object) -> dict[str, Any]:
    """Return what goes into a log line beside the message: `log.info("notify", extra=fields(owner=1))`."""
    return {_FIELDS: values}


class Formatter(logging.Formatter):
    r"""A formatter that writes one line a record.

    >>> record = logging.LogRecord("memfs", logging.INFO, "", 0, "%s is fenced", ('owner 1 ("x\ny")',), None)
    >>> Formatter().format(record).partition(" level=")[2]
    'info logger=memfs msg="owner 1 (\\"x\\ny\\") is fenced"'
    """

    def format(self, record: logging.LogRecord) -> str:
        """Return the line, without a newline."""
        stamp = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created))
        values: dict[str, object] = {
            "time": f"{stamp}.{int(record.msecs):03}Z",
            "level": record.levelname.lower(),
            "logger": record.name,
            "msg": record.getMessage(),
        }
        if _request.get():
            values["request"] = _request.get()
        values |= getattr(record, _FIELDS, {})
        if record.exc_info:
            values["trace"] = self.formatException(record.exc_info)
        return " ".join(f"{name}={_quoted(value)}" for name, value in values.items())


def _quoted(value: object) -> str:
    text = f"{value:.6f}" if isinstance(value, float) else str(value)
    return text if _PLAIN.fullmatch(text) else json.dumps(text)


class RateLimit(logging.Filter):
    """A filter that lets each place in the code warn in so many lines in so many seconds, by the monotonic clock."""

    def __init__(self) -> None:
        super().__init__()
        self._places: dict[tuple[str, int], tuple[float, int]] = {}  # began when, lines since

    def filter(self, record: logging.LogRecord) -> bool:
        """Return whether a record is to be written, and add to it how many before it were not."""
        if record.levelno < logging.WARNING:
            return True
        place, now = (record.pathname, record.lineno), time.monotonic()
        began, lines = self._places.get(place, (now, 0))
        if now - began >= _INTERVAL:
            if lines > _BURST:
                record.__dict__[_FIELDS] = {**getattr(record, _FIELDS, {}), "suppressed": lines - _BURST}
            began, lines = now, 0
        self._places[place] = began, lines + 1
        return lines < _BURST


def set_up(file: str | None, level: int, *, when_needed: bool = False) -> None:
    """Log to a file, or to standard error. `when_needed`: the file is created by the first line."""
    handler = logging.FileHandler(file, delay=when_needed) if file is not None else logging.StreamHandler()
    handler.setFormatter(Formatter())
    handler.addFilter(RateLimit())
    logging.basicConfig(level=level, handlers=[handler])
