"""Logs of both processes: one line an event, key=value, and a number that follows one system call across them.

    time=2026-11-23T17:45:56.123Z level=info logger=memfs.fuse.files msg=fallocate request=412 ino=3 mode=3 ...
    time=2026-11-23T17:45:56.124Z level=info logger=memfs.owners.registry msg=notify request=412 owner=1 ...
    time=2026-11-23T17:45:56.124Z level=info logger=kvmsim.backing msg=notified request=412 ...

`request` is the number that the kernel gave the FUSE request (`unique`); a notification carries it to the owner.
It is a context variable, so that code which works on a request, in whichever task, need not pass it on.

A value with anything but plain characters is quoted as JSON is, so that no name that a client gives itself can look
like a line or a field of its own; a traceback is one such value. Warnings and errors may be lines that a client
can bring about as often as it likes, so they are limited per place in the code, as the kernel's are
(printk_ratelimited()); the next line that is written says how many were suppressed.
"""

from __future__ import annotations

import fcntl
import json
import logging
import os
import re
import stat
import time
from collections.abc import Iterator, Sequence
from contextvars import ContextVar
from io import TextIOWrapper
from typing import Any, Final

log = logging.getLogger(__name__)

_PLAIN: Final = re.compile(r"[A-Za-z0-9_.:/@+,\[\]()%-]+")
_FIELDS: Final = "fields"  # the attribute of a log record that holds them
MOST_BYTES: Final = 32 << 20  #: of a log file, and of the one before it
_BURST, _INTERVAL = 10, 5.0  # lines, seconds: printk_ratelimit and printk_ratelimit_burst

#: the request that is worked on, and the thread whose system call it is
_work: ContextVar[tuple[int, int]] = ContextVar("work", default=(0, 0))


def current_request() -> int:
    """Return the number of the request that is being worked on; 0 if none is."""
    return _work.get()[0]


def current_caller() -> int:
    """Return the number of the thread whose system call is being worked on; 0 if that is not known."""
    return _work.get()[1]


def work_on(unique: int, caller: int = 0) -> None:
    """Note which request is worked on from now on: `working_on` for a loop in which the next one follows."""
    _work.set((unique, caller))


class working_on:
    """The request that is worked on within the block, and in tasks that it starts.

    `caller` is the thread that waits for it, 0 if that is not known.
    """

    __slots__ = ("_token", "_work")

    def __init__(self, unique: int, caller: int = 0) -> None:
        self._work: Final = (unique, caller)

    def __enter__(self) -> None:
        self._token = _work.set(self._work)

    def __exit__(self, *_: object) -> None:
        _work.reset(self._token)


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
        if request := current_request():
            values["request"] = request
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


class _LogFile(logging.FileHandler):
    """A log file that is made when there is something to log, and can be opened anew when somebody has moved it away.

    Of several names the first is taken that no other process logs to, which a lock says (flock(2)); of one that one.
    Its size is bounded: what is logged with -v is what clients and users do, as often as they like.
    """

    def __init__(self, names: Sequence[str], *, when_needed: bool) -> None:
        self._names = names
        super().__init__(names[0], delay=when_needed)

    def _open(self) -> TextIOWrapper:
        for name in self._names[:-1]:
            file = _open_log(name)
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                file.close()
            else:
                return file
        return _open_log(self._names[-1])

    def emit(self, record: logging.LogRecord) -> None:
        """Write a line. A file that is full then becomes NAME.1, in the place of the one before.

        If the file cannot be opened (no descriptor is left), the line is lost, and whoever logs goes on.
        """
        try:
            super().emit(record)
        except OSError:
            return
        if self.stream is not None:
            status = os.fstat(self.stream.fileno())
            if status.st_size >= MOST_BYTES and stat.S_ISREG(status.st_mode):
                self._begin_anew(self.stream)

    def _begin_anew(self, full: TextIOWrapper) -> None:
        try:
            if os.path.islink(full.name):  # /dev/stdout
                full.truncate(0)
                return
            if _is_still_there(full):
                os.replace(full.name, f"{full.name}.1")
            self.stream = self._open()
            full.close()
        except OSError:  # then what is in it goes
            full.truncate(0)

    def prefer(self, name: str) -> None:
        """Take this name if it can be had, the next time that the file is opened."""
        self._names = [name, *(each for each in self._names if each != name)]

    @property
    def where(self) -> str:
        """The file that is logged to, or will be."""
        return self.stream.name if self.stream is not None else self._names[0]

    def reopen(self) -> None:
        """Open the file anew, if it has been moved away. If that cannot be, the log goes on where it was."""
        self.acquire()
        try:
            if self.stream is not None and not _is_still_there(self.stream):
                before, self.stream = self.stream, self._open()
                before.close()
        except OSError as error:
            log.error("the log cannot be opened anew: %s", error)  # noqa: TRY400
        finally:
            self.release()


def _is_still_there(file: TextIOWrapper) -> bool:
    try:
        return os.path.samestat(os.stat(file.name), os.fstat(file.fileno()))
    except FileNotFoundError:
        return False


def _open_log(name: str) -> TextIOWrapper:
    return open(name, "a", encoding="utf-8")


def set_up(names: Sequence[str], level: int, *, when_needed: bool = False) -> None:
    """Log to the first of these files to which no other process does, or, if there are none, to standard error.

    `when_needed`: the file is made when there is something to log.
    """
    handler = _LogFile(names, when_needed=when_needed) if names else logging.StreamHandler()
    handler.setFormatter(Formatter())
    handler.addFilter(RateLimit())
    logging.basicConfig(level=level, handlers=[handler])


def _log_files() -> Iterator[_LogFile]:
    return (handler for handler in logging.getLogger().handlers if isinstance(handler, _LogFile))


def is_to_file() -> bool:
    """Return whether the log goes to a file."""
    return any(True for _ in _log_files())


def files() -> list[str]:
    """Return the files that are logged to; none if that is standard error."""
    return [file.where for file in _log_files()]


def prefer(name: str) -> None:
    """Log to a file of this name, if it is not open yet and no other process logs there."""
    for handler in _log_files():
        handler.prefer(name)


def reopen() -> None:
    """Open the log's file anew: somebody may have moved it away (logrotate(8))."""
    for handler in _log_files():
        handler.reopen()
