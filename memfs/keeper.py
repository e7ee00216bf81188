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

If the keeper is killed, the worker goes on, and says in its log that nobody will follow it. A service manager that
keeps descriptors (service_manager.py) starts the next keeper instead.

To a keeper of other code it hands all over (upgrade.py): it kills its worker, exits once the other's worker serves, and
goes on if that does not come to it.

Rejected: a new program for each worker (0.7 s of imports while everybody waits, where a fork takes 3 ms); systemd's
descriptor store instead (not everybody has it, and it takes an exec, too).
"""

from __future__ import annotations

import logging
import os
import select
import signal
import socket
import sys
import time
from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Final, NoReturn

from memfs import __version__, service_manager
from memfs.adoption import descriptors, store, write_down
from memfs.contract import logs
from memfs.opening import Opened
from memfs.signals import Forwarded
from memfs.upgrade import Predecessor, Successor

log = logging.getLogger(__name__)

_MOST_RESTARTS: Final = 5
_WITHIN: Final = 10.0  # seconds
_UNLIMITED: Final = "MEMFS_INJECT"  # whoever makes memfs die on purpose (contract/faults.py)
_ATTACHED: Final = b"a"
_STANDARD: Final = (1, 2)  # output and error: of a service, its log


@dataclass(slots=True)
class Worker:
    """The process that serves a mount, as itself sees it. Without a keeper it is the first and the last."""

    predecessor_died: float | None = None  #: when, by the monotonic clock
    death: str = ""  #: how the predecessor died
    keeper: int | None = None  #: a descriptor that becomes readable when the keeper is gone
    is_first: bool = True  #: whether its keeper has started no other
    _report: int | None = None
    _replaced: Predecessor | None = None  #: the keeper that goes on if this worker never serves

    @property
    def is_upgrade(self) -> bool:
        """Whether the predecessor was ended for this one."""
        return self._replaced is not None

    @property
    def is_followed(self) -> bool:
        """Whether another one goes on where this one dies, if the keeper is still there."""
        return self.keeper is not None and (self._report is None or self.predecessor_died is not None)

    def serves(self) -> None:
        """Tell a keeper that is to be replaced that it is: the first request is about to be read."""
        if self._replaced is not None:
            self._replaced.replaced()

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
        self._replaced = opened.predecessor  # until one of our workers serves
        self._successor: Successor | None = None
        self._is_replacing = False

    def run(self, worker: Worker) -> Worker:
        """Start workers, this one first; return in each of them."""
        while True:
            sys.stdout.flush()
            parent = os.getpid()
            try:
                keeper_reads, report = os.pipe()
                worker_sees, keeper = os.pipe()
                pid = self._signals.fork()
            except OSError as error:
                log.critical("no worker can be started: %s: unmounting", error.strerror)
                self._end(1)
            if pid == 0:
                if self._replaced is not None:
                    self._replaced.die_with(parent)
                os.close(keeper_reads)
                os.close(keeper)
                self._forget_successors()
                worker.keeper, worker._report = worker_sees, report
                return worker
            for fd in (report, worker_sees, *self._not_kept):
                os.close(fd)
            self._not_kept = ()
            status = self._wait(pid, keeper_reads)
            os.close(keeper)
            logs.reopen()
            worker = self._next(status)

    def _wait(self, pid: int, report: int) -> int:
        """Pass signals on to a worker until it ends, and return with which status."""
        reports = {report}  # until it has come; then its number may be another's
        while True:
            poll = select.poll()
            successors = self._successors()
            for readable in (self._signals, *reports, *successors):
                poll.register(readable, select.POLLIN)
            come = {fd for fd, _ in poll.poll()}
            if reports & come:
                reports.clear()
                if os.read(report, 1) == _ATTACHED:
                    self._has_attached()
                os.close(report)
            if come.intersection(each.fileno() for each in successors) and self._is_to_be_replaced():
                self._is_replacing = True
                os.kill(pid, signal.SIGKILL)
            signals = list(self._signals.take())  # before: the death that comes next is not to be taken with them
            ended, status = os.waitpid(pid, 0 if self._is_replacing else os.WNOHANG)
            for number, ends in signals:
                self._is_ending |= ends
                if not ended:
                    os.kill(pid, number)
            if ended:
                for fd in reports:
                    os.close(fd)
                return status

    def _has_attached(self) -> None:
        self._opened.mount.attached()
        if self._replaced is not None:
            self._replaced.close()
            self._replaced = None
            write_down(self._opened)
            self._opened.listener.renew()

    def _next(self, status: int) -> Worker:
        """Return who is next after one that ended with this status; exits if nobody is."""
        code = os.waitstatus_to_exitcode(status)
        mount = self._opened.mount
        if self._replaced is not None:
            self._end(max(code, 1))
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
        if self._is_replacing and self._successor is not None:
            death = self._hand_over(self._successor, now)
        else:
            self._count_restart(death, now)
        return Worker(now, death, is_first=False)

    def _count_restart(self, death: str, now: float) -> None:
        """Count a death, and exit if there are too many."""
        restarts = self._restarts
        if len(restarts) == _MOST_RESTARTS and now - restarts[0] < _WITHIN and _UNLIMITED not in os.environ:
            log.critical("%s, the %dth death in %g s: unmounting", death, _MOST_RESTARTS + 1, _WITHIN)
            self._end(1)
        restarts.append(now)

    # -- upgrades ---------------------------------------------------------------------------------------------------

    def _successors(self) -> list[socket.socket | Successor]:
        """Return what is readable when a keeper that wants to take our place says something."""
        if self._successor is not None:
            return [self._successor]
        listener = self._opened.successors
        return [listener.socket] if listener is not None and self._opened.mount.root < 0 else []

    def _forget_successors(self) -> None:
        """Close what only the keeper is to have."""
        if self._successor is not None:
            self._successor.close()
        if self._opened.successors is not None:
            self._opened.successors.socket.close()

    def _is_to_be_replaced(self) -> bool:
        """Hear what a keeper says that wants to take our place, and return whether it can."""
        opened = self._opened
        assert opened.successors is not None
        try:
            if self._successor is None:
                connection, _ = opened.successors.socket.accept()
                said: dict[str, Any] = {"pid": os.getpid(), "listener": opened.successors.path, "log": logs.files()}
                said["is_stored"], said["level"] = opened.is_stored, logging.getLogger().level
                said["environment"] = service_manager.inherited()
                fds = [*descriptors(opened), opened.successors.socket.fileno(), *_STANDARD]
                self._successor = Successor(connection, said, fds)
                return False
            if self._successor.is_ready():
                return True
        except PermissionError:
            log.warning("somebody who is not root has asked for the mount, and has got nothing")
        except OSError:  # it is gone already
            pass
        self._close_successor()
        return False

    def _close_successor(self) -> None:
        if self._successor is not None:
            self._successor.close()
            self._successor = None

    def _hand_over(self, successor: Successor, died: float) -> str:
        """Let another keeper go on; exits if it does, and else returns why not."""
        if successor.replace(died):
            service_manager.main_process(successor.pid)
            for number, _ in self._signals.take():
                os.kill(successor.pid, number)
            sys.exit(0)
        self._close_successor()
        self._is_replacing = False
        return "an upgrade has failed"

    def _end(self, code: int) -> NoReturn:
        self._close_successor()
        if self._replaced is None:  # else the old one goes on, with all there is
            self._opened.close()
        sys.exit(code)


def keep(opened: Opened, not_kept: Iterable[int] = ()) -> Worker:
    """Become the keeper of a mount. Returns in each worker, and in the keeper never: it exits when the mount has ended.

    The descriptors that are `not_kept` are the first worker's only. Call while there is one thread, outside of an event
    loop. Raises UpgradeError if a predecessor does not hand it over.
    """
    keeper = _Keeper(opened, not_kept)
    if opened.predecessor is not None:
        return keeper.run(Worker(opened.predecessor.end(), f"upgraded to {__version__}", _replaced=opened.predecessor))
    if opened.was_served:
        opened.listener.renew()
        return keeper.run(Worker(time.monotonic(), "all processes had died"))
    write_down(opened)
    store(opened)
    return keeper.run(Worker())
