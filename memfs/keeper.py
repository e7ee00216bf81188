r"""The keeper: a process that does nothing but hold what a mount is made of, and start the next worker when one dies.

    keeper (no threads, no event loop)          holds /dev/fuse, the backing's roots, the log of the state, the listener
        \-- fork --> worker                     serves; killed -> the next one; exited -> the mount has ended

A FUSE connection lives as long as anybody has its descriptor of /dev/fuse, and so does a tmpfs that is mounted nowhere
as long as anybody has its root. So nothing has to be handed on: a worker is a fork of the keeper, with all the code
loaded, and reads in the log what the last one knew. How it takes over is said in daemon.py.

The keeper must not have a descriptor of its own mount, for it would wait for an answer of the worker that it is about
to start. It has that of the root until the mount is attached, which the first worker says. A worker that is killed
before is not followed by another.

If one worker after the other dies, there is a bug that each runs into (and not in a request, for those are tried three
times; fuse/resent.py): after five restarts in ten seconds the mount is unmounted.

If the keeper is killed, the worker goes on, and says in its log that nobody will follow it.

Rejected: a new program for each worker (0.7 s of imports while everybody waits, where a fork takes 3 ms); systemd's
descriptor store instead (not everybody has it, and it takes an exec, too).
"""

from __future__ import annotations

import logging
import os
import signal
import sys
import time
from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Final

from memfs.opening import Opened
from memfs.signals import forward_to, undo_forwarding

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
    killed_by: str = ""  #: the name of the signal that killed the predecessor
    keeper: int | None = None  #: a descriptor that becomes readable when the keeper is gone
    _report: int | None = None

    @property
    def restarts(self) -> int:
        """How often a worker was followed by another."""
        return self.generation - 1

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
        self._pid = 0
        self._is_ending = False

    def run(self) -> Worker:
        """Start workers; return in each of them."""
        worker = Worker()
        forward_to(self._forward)
        while True:
            keeper_reads, report = os.pipe()
            worker_sees, keeper = os.pipe()
            sys.stdout.flush()
            self._pid = os.fork()
            if self._pid == 0:
                os.close(keeper_reads)
                os.close(keeper)
                worker.keeper, worker._report = worker_sees, report
                undo_forwarding()
                return worker
            for fd in (report, worker_sees, *self._not_kept):
                os.close(fd)
            self._not_kept = ()
            self._wait_attached(keeper_reads)
            _, status = os.waitpid(self._pid, 0)
            os.close(keeper)
            self._pid = 0
            if not os.WIFSIGNALED(status):
                self._end(os.waitstatus_to_exitcode(status))
            if self._is_ending or not self._opened.mount.is_connected:
                self._end(0)
            worker = self._successor(worker, os.WTERMSIG(status))

    def _wait_attached(self, pipe: int) -> None:
        """Wait until the worker has attached the mount, or has died."""
        if os.read(pipe, 1) == _ATTACHED:
            self._opened.mount.attached()
        os.close(pipe)

    def _successor(self, worker: Worker, number: int) -> Worker:
        now, name = time.monotonic(), signal.Signals(number).name
        if self._opened.mount.root >= 0:
            log.critical("killed by %s before it was mounted", name)
            self._end(1)
        if len(self._restarts) == _MOST_RESTARTS and now - self._restarts[0] < _WITHIN and _UNLIMITED not in os.environ:
            log.critical("killed by %s, the %dth time in %g s: unmounting", name, _MOST_RESTARTS + 1, _WITHIN)
            self._end(1)
        self._restarts.append(now)
        return Worker(worker.generation + 1, now, name)

    def _end(self, code: int) -> None:
        self._opened.close()
        sys.exit(code)

    def _forward(self, number: int, *, ends: bool) -> None:
        """Pass a signal on to the worker."""
        self._is_ending |= ends
        if self._pid:
            os.kill(self._pid, number)


def keep(opened: Opened, not_kept: Iterable[int] = ()) -> Worker:
    """Become the keeper of a mount. Returns in each worker, and in the keeper never: it exits when the mount has ended.

    The descriptors that are `not_kept` are the first worker's only. Call while there is one thread, outside of an event
    loop.
    """
    return _Keeper(opened, not_kept).run()
