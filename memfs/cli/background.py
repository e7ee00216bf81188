"""A daemon is forked off, and reports over a pipe: that it is ready and what could not be had, or why it is not."""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Callable, Sequence
from typing import NoReturn, Protocol

from memfs.cli.command import CommandError
from memfs.inherited import leave_behind

log = logging.getLogger(__name__)


class Serve(Protocol):
    """What the daemon does, from the start to its end. Raises CommandError, or OSError with a file name."""

    def __call__(self, ready: Callable[[list[str]], None], not_kept: Sequence[int], /) -> None:
        """Serve, and call `ready` when the mount answers; `not_kept` are descriptors that this takes."""


def prepare() -> None:
    """Prepare for what a daemon imports."""
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")  # numpy would start a thread a CPU for nothing


def serve_in_background(
    serve: Serve,
    if_it_dies: str = "the daemon died while mounting; --foreground shows why",
    *,
    keep: Sequence[int] = (),
) -> list[str]:
    """Serve in a process of its own, and return when the mount answers what could not be had. Raises CommandError.

    `keep` are descriptors that it is to have.
    """
    reader, writer = os.pipe()
    sys.stdout.flush()
    if os.fork() == 0:
        leave_behind([writer, *keep])
        _detach()
        _serve_and_report(serve, writer)
    os.close(writer)
    with os.fdopen(reader, errors="surrogateescape") as report:
        outcome, *lines = report.read().split("\n")
    if outcome != "ready":
        raise CommandError(lines[0] if lines else if_it_dies)
    return [line for line in lines if line]


def _serve_and_report(serve: Serve, report: int) -> NoReturn:
    """Serve, and tell the parent over a pipe how it went.

    When it has been told that all is well, the pipe is gone, and what ends the daemon is only in the log.
    """
    pipe = os.fstat(report)

    def is_awaited() -> bool:
        try:
            return os.path.samestat(os.fstat(report), pipe)
        except OSError:  # and the keeper closes it for workers to come
            return False

    def tell(outcome: str, lines: list[str]) -> None:
        try:
            os.write(report, os.fsencode("\n".join([outcome, *lines])))
        except BrokenPipeError:
            raise CommandError("who was mounting it is gone") from None
        finally:
            os.close(report)

    try:
        serve(lambda notes: tell("ready", notes), [report])
    except Exception as error:
        is_known = isinstance(error, CommandError | OSError)
        why = _sentence(error) if is_known else f"a bug in memfs: {_sentence(error)}; --foreground shows more"
        if is_awaited():
            tell("failed", [why])
        else:
            log.critical("memfs has ended: %s", why, exc_info=not is_known)
        os._exit(1)
    os._exit(0)


def _sentence(error: Exception) -> str:
    if isinstance(error, OSError) and error.filename:
        return f"{error.filename}: {error.strerror}"
    return str(error) or type(error).__name__


def _detach() -> None:
    """Leave the terminal that the command was started from (daemon(7))."""
    os.setsid()
    null = os.open(os.devnull, os.O_RDWR)
    for fd in (0, 1, 2):
        os.dup2(null, fd)
    os.close(null)
