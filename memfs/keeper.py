r"""The keeper: a process that does nothing but hold what a mount is made of, and start the next worker when one dies.

    keeper (no threads, no event loop)          holds /dev/fuse, the backing's roots, the log of the state, the listener
        \-- fork --> worker                     serves; dies -> the next one; exits with 0 -> the mount has ended

A FUSE connection lives as long as anybody has its descriptor of /dev/fuse, and so does a tmpfs that is mounted nowhere
as long as anybody has its root. So nothing has to be handed on: a worker is a fork of the keeper, with all the code
loaded, and reads in the log what the last one knew. How it takes over is said in survival.py.

The keeper must not have a descriptor of its own mount, for it would wait for an answer of the worker that it is about
to start. It has that of the root until the mount is attached, which the first worker says. A worker that dies before is
not followed by another.

A worker that is killed has died, and so has one that a bug ends: it says in the log what it was, and exits without
taking anything apart (`dying` in survival.py). If one after the other dies, there is a bug that each runs into: after
five restarts in ten seconds the mount is unmounted.

A log that was moved away (logrotate(8)) is opened anew when a worker has died and nobody else has it open.

If the keeper is killed, the worker goes on, and says in its log that nobody will follow it.

Rejected: a new program for each worker (0.7 s of imports while everybody waits, where a fork takes 3 ms); systemd's
descriptor store instead (not everybody has it, and it takes an exec, too).
"""

from __future__ import annotations

import logging
import os
import select
import signal
import sys
import time
from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Final, NoReturn

from memfs.contract import logs
from memfs.opening import Opened
from memfs.signals import Forwarded

log = logging.getLogger(__name__)

_MOST_RESTARTS: Final = 5
_WITHIN: Final = 10.0  # seconds
_UNLIMITED: Final = "MEMFS_INJECT"  # whoever makes memfs die on purpose (contract/faults.py)
_ATTACHED: Final = b"a"


@dataclass(slots=True)
class Worker:
    """The process that serves a mount, as itself sees it. Without a keeper it is the first and the last."""

    generation: int = 1
    predecessor_died: float | None = None  #: when, by the monotonic clock
    death: str = ""  #: how the predecessor died
    keeper: int | None = None  #: a descriptor that becomes readable when the keeper is gone
    _report: int | None = None

    @property
    def restarts(self) -> int:
        """How often a worker was followed by another."""
        return self.generation - 1

    @property
    def is_followed(self) -> bool:
        """Whether another one goes on where this one dies, if the keeper is still there."""
        return self.keeper is not None and (self._report is None or self.generation > 1)

    def attached(self) -> None:
        """Tell the keeper that the mount is attached."""
        if self._report is not None:
            os.write(self._report, _ATTACHED)
            os.close(self._report)
            self._report = None


class _Keeper:
    def __init__(self, opened: Opened, not_kept: Iterable[int]) -> None:
        self._opened: Final = opened
        self._not_kept = tuple(not_kept)
        self._restarts: Final[deque[float]] = deque(maxlen=_MOST_RESTARTS)
        self._signals: Final = Forwarded()
        self._is_ending = False

    def run(self) -> Worker:
        """Start workers; return in each of them."""
        worker = Worker()
        while True:
            sys.stdout.flush()
            try:
                keeper_reads, report = os.pipe()
                worker_sees, keeper = os.pipe()
                pid = self._signals.fork()
            except OSError as error:
                log.critical("no worker can be started: %s: unmounting", error.strerror)
                self._end(1)
            if pid == 0:
                os.close(keeper_reads)
                os.close(keeper)
                worker.keeper, worker._report = worker_sees, report
                return worker
            for fd in (report, worker_sees, *self._not_kept):
                os.close(fd)
            self._not_kept = ()
            status = self._wait(pid, keeper_reads)
            os.close(keeper)
            logs.reopen()
            worker = self._successor(worker, status)

    def _wait(self, pid: int, report: int) -> int:
        """Pass signals on to a worker until it ends, and return with which status."""
        poll = select.poll()
        poll.register(self._signals, select.POLLIN)
        poll.register(report, select.POLLIN)
        while True:
            for fd, _ in poll.poll():
                if fd == report:
                    if os.read(report, 1) == _ATTACHED:
                        self._opened.mount.attached()
                    poll.unregister(report)
                    os.close(report)
            ended, status = os.waitpid(pid, os.WNOHANG)
            for number, ends in self._signals.take():
                self._is_ending |= ends
                if not ended:
                    os.kill(pid, number)
            if ended:
                return status

    def _successor(self, worker: Worker, status: int) -> Worker:
        """Return who is next; exits if nobody is."""
        code = os.waitstatus_to_exitcode(status)
        mount = self._opened.mount
        if code == 0:
            self._end(0)
        if self._is_ending or not mount.is_connected:
            self._end(max(code, 0))
        death = f"killed by {signal.Signals(-code).name}" if code < 0 else f"ended by a bug, with exit code {code}"
        now = time.monotonic()
        if mount.root >= 0:
            if code < 0:  # else it has said why
                log.critical("%s before it was mounted", death)
            self._end(max(code, 1))
        if len(self._restarts) == _MOST_RESTARTS and now - self._restarts[0] < _WITHIN and _UNLIMITED not in os.environ:
            log.critical("%s, the %dth death in %g s: unmounting", death, _MOST_RESTARTS + 1, _WITHIN)
            self._end(1)
        self._restarts.append(now)
        return Worker(worker.generation + 1, now, death)

    def _end(self, code: int) -> NoReturn:
        self._opened.close()
        sys.exit(code)


def keep(opened: Opened, not_kept: Iterable[int] = ()) -> Worker:
    """Become the keeper of a mount. Returns in each worker, and in the keeper never: it exits when the mount has ended.

    The descriptors that are `not_kept` are the first worker's only. Call while there is one thread, outside of an event
    loop.
    """
    return _Keeper(opened, not_kept).run()
