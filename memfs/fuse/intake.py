"""Which request of the kernel's is answered next, of those that are queued at /dev/fuse.

As long as there is no more to do than one user's share of an event-loop iteration (contract/aio/turns.py), requests are
answered in the order in which the kernel queued them, one after the other. Beyond that the rest is read ahead, into a
backlog (backlog.py) from which users are served in turns.

What a predecessor had read and not answered comes again when the kernel is told to resend it, but in the order of a
hash: a RELEASE, for which nobody waits, may come after the SETXATTR that followed it. So all of it is read first, and
answered by age.
"""

from __future__ import annotations

import errno
import logging
import os
from collections import deque
from collections.abc import Callable
from typing import Final

from memfs.contract.aio.turns import SHARE, Turns
from memfs.fuse.abi import BUFFER_SIZE, IN_HEADER, RESENT, Malformed, Opcode, Request, resend
from memfs.fuse.backlog import Backlog
from memfs.fuse.caller import Callers

log = logging.getLogger(__name__)

_AHEAD: Final = 64  # requests that are read ahead in an event-loop iteration
#: Not in the backlog: what its caller does next relies on it, whichever user the kernel says that it is
_IN_ORDER: Final = frozenset(
    {
        *(Opcode.INIT, Opcode.DESTROY, Opcode.INTERRUPT),
        *(Opcode.FORGET, Opcode.BATCH_FORGET, Opcode.RELEASE, Opcode.RELEASEDIR),
    }
)


class Unmounted(Exception):
    """There will be no more requests."""


#: What read(2) says of a mount that has gone; the second if it had a request in hand by then (fuse_dev_do_read)
_UNMOUNTED: Final = (errno.ENODEV, errno.ECONNABORTED)


class Intake:
    """Requests from /dev/fuse, whose descriptor must not block.

    `turns` counts the work that was done; `refuse` is called with the number of a request that cannot be read and with
    an errno.
    """

    def __init__(self, fuse_fd: int, turns: Turns, refuse: Callable[[int, int], None]) -> None:
        self._fuse: Final = fuse_fd
        self._turns: Final = turns
        self._refuse: Final = refuse
        self._buffer: Final = memoryview(bytearray(BUFFER_SIZE))
        self._backlog: Final = Backlog(lambda request: Callers.here().user(request))
        self._share_end = turns.total + SHARE  # how much work will have been done when other tasks have to run
        self._ahead = _AHEAD  # how many requests may still be read ahead before they do again
        self._again: Final[deque[Request]] = deque()  # what a predecessor had read, the oldest first
        self._overtaken = False  # whether one that did not fit went before the backlog, whose turn it is now

    @property
    def share_is_over(self) -> bool:
        """Whether other tasks have to run before more is answered."""
        return self._turns.total >= self._share_end

    def begin_share(self) -> None:
        """Note that other tasks have run."""
        self._share_end, self._ahead = self._turns.total + SHARE, _AHEAD

    def take_over(self) -> None:
        """Have what a predecessor had read and not answered come again, before all else. Raises Unmounted, OSError."""
        os.write(self._fuse, resend())
        others = list[Request]()
        while (request := self._receive()) is not None:
            request.keep()
            (self._again if request.unique & RESENT else others).append(request)
        by_age = sorted(self._again, key=lambda request: request.unique)
        self._again.clear()
        self._again.extend((*by_age, *others))

    def interrupt(self, number: int) -> bool:
        """Mark a request that has not been answered yet as interrupted. Returns whether it is here."""
        for request in self._again:
            if request.number == number:
                request.is_interrupted = True
                return True
        return self._backlog.interrupt(number)

    def next(self) -> Request | None:
        """Return the request that is to be answered next; None if there is none now, or the share is over.

        Raises Unmounted.
        """
        is_over, backlog = self._turns.total >= self._share_end, self._backlog
        if not (is_over or backlog.queues or self._again):
            return self._receive()
        if self._again:
            return None if is_over else self._again.popleft()
        while self._ahead and not self._overtaken:
            request = self._receive()
            self._ahead = self._ahead - 1 if request is not None else 0
            if request is None:
                break
            if request.opcode in _IN_ORDER:
                return request
            if not backlog.add(request):
                self._overtaken = bool(backlog.queues)  # else an endless row of these would starve it
                return request
        if is_over or not backlog.queues:
            return None
        self._overtaken = False
        return backlog.pop()

    def _receive(self) -> Request | None:
        """Read a request; None if there is none now. Raises Unmounted."""
        while True:
            try:
                length = os.readv(self._fuse, [self._buffer])
            except BlockingIOError:
                return None
            except InterruptedError:
                continue
            except OSError as error:
                if error.errno in _UNMOUNTED:
                    raise Unmounted from None
                if error.errno != errno.ENOENT:  # the request was interrupted before we read it
                    raise
            else:
                try:
                    return Request.parse(self._buffer[:length])
                except Malformed as error:
                    log.error("from the kernel: %s", error)  # noqa: TRY400
                    if length >= IN_HEADER.size:
                        self._refuse(IN_HEADER.unpack_from(self._buffer)[2], errno.EIO)
