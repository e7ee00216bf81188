"""The pump between /dev/fuse and pyfuse3, which answers nearly all requests itself.

pyfuse3 has no handlers for FALLOCATE, LSEEK and IOCTL, and after the first ENOSYS the kernel never asks again. But
libfuse can be given any descriptor that speaks the FUSE protocol. So the channel owns /dev/fuse and gives pyfuse3 one
end of a socketpair:

    kernel  <- /dev/fuse ->  Channel  <- SOCK_SEQPACKET ->  libfuse, pyfuse3

A table (opcodes.py) says which requests have a handler here; all others go through unchanged, and so do their replies,
except for that to INIT, which must say things that pyfuse3 does not know.

Order matters: requests of one user are handed on, or their handlers called, in the order in which the kernel queued
them. Between users there are turns (intake.py) where more is asked than is done in one event-loop iteration. Handlers
are eager tasks (contract/aio/eager.py): one that does not wait has answered before the next request is looked at, so
that a RELEASE is seen before the SETXATTR that follows it; one that waits holds up nobody. Handing on is such a
handler, too: where the socketpair is full, the request waits and not the channel. How many wait is bounded by how many
threads are in a system call on the mount.

A handler that waits is cancelled when the kernel says that its caller was interrupted (FUSE_INTERRUPT), and the caller
gets EINTR; a handler that has begun something that must be finished shields it (File does).

Rejected:
- a thread for the pump: two wake-ups across CPUs for each request, and the handlers share state with pyfuse3's.
- patching pyfuse3: the channel needs only the kernel's stable ABI and libfuse's /dev/fd feature.
- leaving to pyfuse3 what waits: it has 99 tasks, and the 100th truncation of files whose owners are slow to acknowledge
  would stop the mount for everybody.
- leaving to pyfuse3 what is long: the data of a few O_DIRECT writers, or one large directory, would fill the
  socketpair.
- leaving to pyfuse3 what is rare: there, to do something and to answer are two steps, between which others come.
- doing without pyfuse3: it negotiates INIT for every kernel that there is.
"""

from __future__ import annotations

import errno
import logging
import os
import socket
from collections.abc import Awaitable, Callable, Coroutine, Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, Final, NamedTuple

import trio

from memfs.contract.aio.busy_poll import BusyPoll
from memfs.contract.aio.eager import LoopTask, run_loop
from memfs.contract.aio.turns import Turns
from memfs.contract.logs import fields, work_on
from memfs.fuse.abi import (
    BUFFER_SIZE,
    INTERRUPT_IN,
    OUT_HEADER,
    RESENT,
    Malformed,
    Opcode,
    Request,
    error_reply,
    invalidate_attributes,
    reply,
    unpack,
)
from memfs.fuse.intake import Intake, Unmounted
from memfs.fuse.resent import Resent
from memfs.state.journal import NO_JOURNAL, Journal

log = logging.getLogger(__name__)

#: Answers a request: with what follows the header of a successful reply, or with None for no reply. Raises OSError for
#: a reply with that errno. The request's body changes its place when the handler waits: see Request
Handler = Callable[[Request], Coroutine[Any, Any, bytes | None]]
#: Changes a successful reply of pyfuse3 in place: gets the whole reply, header included
Amendment = Callable[[bytearray], None]

_FALLOCATE: Final = int(Opcode.FALLOCATE)
_BURST: Final = 32  # replies of pyfuse3 before other tasks run
_LARGE: Final = 1 << 15  # bytes of a request or its reply that count as a unit of work
_LONGEST_POLL: Final = 200e-6  # seconds: KVM's halt_poll_ns, more than it takes to be woken on another CPU
_FIRST_POLL: Final = 40e-6  # seconds


@dataclass(frozen=True, slots=True)
class Pyfuse3:
    """What stands in the table for a request that pyfuse3 answers."""

    why: str  #: it may: because it answers immediately
    amend: Callable[[Request], Amendment] | None = None  #: how its reply is to be amended


class Before(NamedTuple):
    """What a predecessor has left."""

    state: Mapping[bytes, bytes]
    init: bytes  #: the request with which the kernel began


class Channel:
    """Owns the descriptor of /dev/fuse and one end of the socketpair.

    `table` says by opcode who answers; what is not in it is pyfuse3's. What a request has changed is committed to the
    journal right before it is answered.
    """

    def __init__(self, fuse_fd: int, table: Mapping[int, Handler | Pyfuse3], journal: Journal = NO_JOURNAL) -> None:
        self._fuse: Final = fuse_fd
        self._journal: Final = journal
        self._resent: Resent | None = None
        self._swallowed = -1  # the number of a request whose reply the kernel has had already
        self._renegotiated: Final = trio.lowlevel.ParkingLot()
        self._handlers: Final[dict[int, Handler]] = {
            opcode: handler for opcode, handler in table.items() if not isinstance(handler, Pyfuse3)
        }
        self._handlers[Opcode.INTERRUPT] = self._interrupt
        self._pyfuse3: Final = {opcode: entry for opcode, entry in table.items() if isinstance(entry, Pyfuse3)}
        self._amend_next: dict[int, Amendment] = {}  # by unique: replies that pyfuse3 owes and we will change
        self._waiting: dict[int, trio.CancelScope] = {}  # by unique: requests whose handlers wait
        self._turns: Turns
        self._intake: Intake
        self._poll: Final = BusyPoll(_LONGEST_POLL, window=_FIRST_POLL)
        os.set_blocking(fuse_fd, False)
        self._ours, self._libfuse = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._ours.setblocking(False)
        self._may_send: Final = trio.Lock()  # held by the request that waits for space in the socketpair

    def hand_over(self) -> int:
        """Return the descriptor for libfuse to use (as /dev/fd/N) and to close."""
        return self._libfuse.detach()

    async def run(self, unmounted: Callable[[], None], before: Before | None = None) -> None:
        """Pump until cancelled, or until the filesystem is unmounted; then call `unmounted` and return.

        `before` is what a predecessor has left, if there was one.
        """
        self._turns = Turns.here()
        self._intake = Intake(self._fuse, self._turns, self._refuse)
        async with trio.open_nursery() as nursery:

            async def serve(task: LoopTask) -> None:
                try:
                    await self._serve(task)
                except Unmounted:
                    nursery.cancel_scope.cancel()

            nursery.start_soon(self._replies)
            if before is not None:
                await self._take_over(before)
            run_loop(serve, nursery.start_soon)
        unmounted()

    async def _take_over(self, before: Before) -> None:
        """Do what comes before the first request."""
        init = Request.parse(memoryview(before.init))
        self._swallowed = init.unique  # the kernel has had the reply
        await self._forward(init)
        while self._swallowed >= 0:
            await self._renegotiated.park()
        self._resent = Resent(before.state, self._journal, self._write)
        with suppress(Unmounted, OSError):  # ENODEV, which the first request says as well
            self._intake.take_over()

    def close(self) -> None:
        """Close all descriptors. The kernel then aborts whatever it waits for."""
        self._ours.close()
        self._libfuse.close()
        os.close(self._fuse)

    # -- kernel to us -----------------------------------------------------------------------------------------------

    async def _serve(self, task: LoopTask) -> None:
        """Answer requests or hand them on, until a handler waits. Raises Unmounted."""
        intake, handlers, forward, poll = self._intake, self._handlers, self._forward, self._poll
        handler: Handler = forward
        while True:
            # A program that has been answered often asks again immediately. If others are to be answered by other
            # tasks, those need the event loop.
            if handler is not forward and not self._waiting:
                poll.start()
                poll.yield_first()
            while (request := intake.next()) is None:
                if intake.share_is_over:
                    await trio.lowlevel.checkpoint()
                    intake.begin_share()
                elif not poll.goes_on():
                    await trio.lowlevel.wait_readable(self._fuse)
                    intake.begin_share()
            poll.stop()
            handler = handlers.get(request.opcode, forward)
            unique = request.unique
            work_on(unique & ~RESENT, request.pid)
            if unique & RESENT and self._resent is not None:
                work = self._resent.handle(request, handler)
            else:
                work = handler(request)
            try:
                trap = work.send(None)
            except StopIteration as end:
                self._answer(request, end.value)
            except Exception as failure:
                self._answer(request, None, _errno(failure, request.opcode))
            else:
                await self._finish(request, task.rest(work, trap), task.scope)
                return

    async def _finish(self, request: Request, rest: Awaitable[bytes | None], scope: trio.CancelScope) -> None:
        """Answer a request whose handler waits. `scope` is around it."""
        request.keep()
        self._waiting[request.number] = scope  # its INTERRUPT may be the next that is read
        if request.is_interrupted:
            scope.cancel()
        error, payload = 0, None
        try:
            payload = await rest
        except Exception as failure:
            error = _errno(failure, request.opcode)
        except trio.Cancelled:
            if scope.cancel_called:
                self._write(invalidate_attributes(request.nodeid))  # a part of it may have been done
                self._answer(request, None, errno.EINTR, waited=True)
            raise
        finally:
            del self._waiting[request.number]
        self._answer(request, payload, error, waited=True)

    def _answer(self, request: Request, payload: bytes | None, error: int = 0, *, waited: bool = False) -> None:
        """Answer a request with an errno or, if that is 0, with what the handler returned. Logs and counts it."""
        nbytes = len(request.message) + len(payload or b"")
        self._turns.total += 1 + nbytes // _LARGE  # whose turn it is, the backlog knows
        # What changes pages can be followed through the logs; so can what has had to wait.
        if (waited or request.opcode == _FALLOCATE) and log.isEnabledFor(logging.INFO):
            log.info("answered", extra=fields(opcode=request.opcode, error=error))
        if error:
            message = error_reply(request.unique, error)
        elif payload is not None:
            message = reply(request.unique, payload)
        else:
            message = b""
        if self._journal.dirty:
            self._journal.commit(request.number if message else 0, message)
        if message:
            self._write(message)

    async def _interrupt(self, request: Request) -> None:
        """Cancel the handler of an interrupted request, if it waits; else it is pyfuse3's."""
        (unique,) = unpack(INTERRUPT_IN, request.body)
        unique &= ~RESENT
        scope = self._waiting.get(unique)
        if scope is not None:
            scope.cancel()
        elif not self._intake.interrupt(unique):
            await self._forward(request)

    def _refuse(self, unique: int, error: int) -> None:
        self._write(error_reply(unique, error))

    def _write(self, message: bytes | bytearray | memoryview) -> None:
        """Write a message to the kernel."""
        try:
            os.write(self._fuse, message)
        except OSError as error:
            # ENOENT: the caller was interrupted and is gone. ENODEV: unmounted meanwhile.
            if error.errno not in (errno.ENOENT, errno.ENODEV):
                log.error("the kernel refused a reply: %s", error)  # noqa: TRY400

    # -- to libfuse, and back ---------------------------------------------------------------------------------------

    async def _forward(self, request: Request) -> None:
        """Hand a request on, behind those that wait for that."""
        entry = self._pyfuse3.get(request.opcode)
        if entry is not None and entry.amend is not None:
            self._amend_next[request.unique] = entry.amend(request)
        if not self._may_send.locked():
            try:
                self._ours.send(request.message)
            except BlockingIOError:
                pass
            else:
                return
        async with self._may_send:
            while True:
                await trio.lowlevel.wait_writable(self._ours)
                try:
                    self._ours.send(request.message)
                except BlockingIOError:
                    continue
                return

    async def _replies(self) -> None:
        buffer = bytearray(BUFFER_SIZE)
        view = memoryview(buffer)
        while True:
            await trio.lowlevel.wait_readable(self._ours)
            for _ in range(_BURST):
                try:
                    length = self._ours.recv_into(buffer)
                except BlockingIOError:
                    break
                if not length:
                    return
                _, error, unique = OUT_HEADER.unpack_from(buffer)
                message: bytearray | memoryview = view[:length]
                amendment = self._amend_next.pop(unique, None)
                if amendment is not None and not error:
                    message = bytearray(message)
                    amendment(message)
                if unique == self._swallowed:
                    self._swallowed = -1
                    self._renegotiated.unpark_all()
                else:
                    self._write(message)


def _errno(failure: Exception, opcode: int) -> int:
    """Return the errno for an exception; what is no OSError is a bug, or the kernel's, and is logged."""
    if isinstance(failure, OSError) and failure.errno:
        return failure.errno
    log.error("opcode %d: %s", opcode, failure, exc_info=None if isinstance(failure, Malformed) else failure)
    return errno.EIO
