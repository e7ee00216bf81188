"""The pump between /dev/fuse and pyfuse3, which answers itself what pyfuse3 cannot.

pyfuse3 has no handlers for FALLOCATE, LSEEK and IOCTL, and after the first ENOSYS the kernel never asks again. But
libfuse can be given any descriptor that speaks the FUSE protocol. So the channel owns /dev/fuse and gives pyfuse3 one
end of a socketpair:

    kernel  <- /dev/fuse ->  Channel  <- SOCK_SEQPACKET ->  libfuse, pyfuse3

Requests for which there is a handler here are answered here; all others go through unchanged. An observer may look at
a request that goes through and amend the reply (INIT and OPEN must say things that pyfuse3 does not know).

Order matters: a request is handed on, or its handler called, in the order in which the kernel queued it. A handler
that can answer at once returns bytes, and has then answered before the next request is looked at; one that must wait
returns a coroutine, which runs as a task of its own. That is how a RELEASE is seen before the SETXATTR that follows it.

A handler that waits is cancelled when the kernel says that its caller was interrupted (FUSE_INTERRUPT), and the caller
gets EINTR; whoever has begun something that must be finished shields it (File does).

Rejected: a thread for the pump (two wake-ups across CPUs for each request, and the handlers share state with
pyfuse3's); patching pyfuse3 (the channel needs only the kernel's stable ABI and libfuse's /dev/fd feature).
"""

from __future__ import annotations

import errno
import logging
import os
import socket
from collections.abc import Callable, Coroutine
from typing import Any, Final

import trio

from memfs.fuse.wire import (
    BUFFER_SIZE,
    IN_HEADER,
    INTERRUPT_IN,
    OUT_HEADER,
    Malformed,
    Opcode,
    Request,
    error_reply,
    invalidate_attributes,
    unpack,
)
from memfs.logs import fields, working_on
from memfs.lookout import Lookout

log = logging.getLogger(__name__)

#: Answers a request: with the reply (header included), with a coroutine that returns it, or with None for no reply
Handler = Callable[[Request], "bytes | Coroutine[Any, Any, bytes] | None"]
#: Changes a successful reply of pyfuse3 in place: gets the whole reply, header included
Amendment = Callable[[bytearray], None]
#: Sees a request that goes on to pyfuse3, and may return an amendment of its reply
Observer = Callable[[Request], "Amendment | None"]

_SO_SNDBUFFORCE: Final = 32
_BURST: Final = 256  # requests and looks for them before others get a turn
_LINGER: Final = 100e-6  # seconds
_LOOKS: Final = 20  # about 40 us: half of what it takes to be woken from another CPU


class Channel:
    """Owns the descriptor of /dev/fuse and one end of the socketpair.

    `max_message` is how many bytes fit through the socketpair in one piece: less than the largest request if the
    machine limits socket buffers (net.core.wmem_max) and we may not exceed that; INIT must then say so.
    """

    def __init__(self, fuse_fd: int, handlers: dict[int, Handler], observers: dict[int, Observer]) -> None:
        self._fuse: Final = fuse_fd
        self._handlers: Final = handlers
        self._observers: Final = observers
        self._amend_next: dict[int, Amendment] = {}  # by unique: replies that pyfuse3 owes and we will change
        self._running: dict[int, trio.CancelScope] = {}  # by unique: handlers that wait
        os.set_blocking(fuse_fd, False)
        self._lookout: Final = Lookout.here()
        self._lookout.add(fuse_fd)
        self._ours, self._libfuse = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self.max_message: Final = min(_fit_buffer(self._ours), _fit_buffer(self._libfuse))
        self._ours.setblocking(False)

    def hand_over(self) -> int:
        """The descriptor for libfuse to use (as /dev/fd/N) and to close."""
        return self._libfuse.detach()

    async def run(self, unmounted: Callable[[], None]) -> None:
        """Pump until cancelled, or until the filesystem is unmounted; then call `unmounted` and return."""
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._replies)
            await self._requests(nursery)
            nursery.cancel_scope.cancel()
        unmounted()

    def close(self) -> None:
        """Close all descriptors. The kernel then aborts whatever it waits for."""
        self._ours.close()
        self._libfuse.close()
        self._lookout.remove(self._fuse)
        os.close(self._fuse)

    # -- kernel to libfuse ------------------------------------------------------------------------------------------

    async def _requests(self, nursery: trio.Nursery) -> None:
        buffer = memoryview(bytearray(BUFFER_SIZE))
        while True:
            await trio.lowlevel.wait_readable(self._fuse)
            looks = 0  # for another request, since the last one
            for _ in range(_BURST):
                try:
                    length = os.readv(self._fuse, [buffer])
                except BlockingIOError:
                    if not looks:
                        break
                    looks -= 1
                    os.sched_yield()
                    continue
                except InterruptedError:
                    continue
                except OSError as error:
                    if error.errno == errno.ENODEV:  # unmounted
                        return
                    if error.errno == errno.ENOENT:  # the request was interrupted before we read it
                        continue
                    raise
                # Who has been answered often asks again at once, and to sleep and be woken takes longer than to look a
                # few times. Not so when somebody else has to answer: that needs the event loop.
                looks = _LOOKS if await self._dispatch(buffer[:length], nursery) else 0

    async def _dispatch(self, data: memoryview, nursery: trio.Nursery) -> bool:
        """Answer a request or hand it on. Returns whether it is answered."""
        try:
            request = Request.parse(data)
        except Malformed as error:
            log.error("from the kernel: %s", error)  # noqa: TRY400
            if len(data) >= IN_HEADER.size:
                self._answer(error_reply(IN_HEADER.unpack_from(data)[2], errno.EIO))
            return False
        handler = self._handlers.get(request.opcode)
        try:
            if request.opcode == Opcode.INTERRUPT and self._interrupt(request):
                return False
            if handler is None:
                self._observe(request)
            else:
                with working_on(request.unique):
                    answer = handler(request)
        except Exception as error:
            self._answer(self._failure(request.unique, request.opcode, error))
            return True
        if handler is None:
            await self._forward(data)
            return False
        if isinstance(answer, Coroutine):
            # Known from now on, and not only when the task begins: its INTERRUPT may be the next that we read.
            scope = self._running[request.unique] = trio.CancelScope()
            with working_on(request.unique):
                nursery.start_soon(self._wait_for, request, answer, scope)
            return False
        if answer is not None:
            self._answer(answer)
        return True

    def _observe(self, request: Request) -> None:
        observer = self._observers.get(request.opcode)
        amendment = observer(request) if observer is not None else None
        if amendment is not None:
            self._amend_next[request.unique] = amendment

    async def _wait_for(self, request: Request, work: Coroutine[Any, Any, bytes], scope: trio.CancelScope) -> None:
        with scope:
            try:
                answer = await work
            except Exception as error:
                answer = self._failure(request.unique, request.opcode, error)
            finally:
                del self._running[request.unique]
        if scope.cancelled_caught:
            self._answer(invalidate_attributes(request.nodeid))  # a part of it may have been done
            answer = error_reply(request.unique, errno.EINTR)
        if log.isEnabledFor(logging.INFO):
            log.info("answered", extra=fields(opcode=request.opcode, error=-OUT_HEADER.unpack_from(answer)[1]))
        self._answer(answer)
        if not self._running:  # who was answered may ask again at once
            self._lookout.look(_LINGER)

    def _interrupt(self, request: Request) -> bool:
        """Whether the interrupted request is one of ours; then it is being cancelled."""
        (unique,) = unpack(INTERRUPT_IN, request.body)
        scope = self._running.get(unique)
        if scope is not None:
            scope.cancel()
        return scope is not None

    def _failure(self, unique: int, opcode: int, error: Exception) -> bytes:
        if isinstance(error, OSError) and error.errno:
            return error_reply(unique, error.errno)
        log.error("opcode %d: %s", opcode, error, exc_info=None if isinstance(error, Malformed) else error)
        return error_reply(unique, errno.EIO)

    async def _forward(self, data: memoryview) -> None:
        while True:
            try:
                self._ours.send(data)
            except BlockingIOError:
                await trio.lowlevel.wait_writable(self._ours)
            else:
                return

    # -- libfuse to kernel ------------------------------------------------------------------------------------------

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
                amendment = self._amend_next.pop(unique, None)
                if amendment is None or error:
                    self._answer(view[:length])
                else:
                    reply = bytearray(view[:length])
                    amendment(reply)
                    self._answer(reply)

    def _answer(self, reply: bytes | bytearray | memoryview) -> None:
        try:
            os.write(self._fuse, reply)
        except OSError as error:
            # ENOENT: the caller was interrupted and is gone. ENODEV: unmounted meanwhile.
            if error.errno not in (errno.ENOENT, errno.ENODEV):
                log.error("the kernel refused a reply: %s", error)  # noqa: TRY400


def _fit_buffer(end: socket.socket) -> int:
    """Make room for the largest request, as far as we may (socket(7)). Returns the largest message that fits, bytes."""
    for option in (_SO_SNDBUFFORCE, socket.SO_SNDBUF):
        try:
            end.setsockopt(socket.SOL_SOCKET, option, 2 * BUFFER_SIZE)
        except PermissionError:
            continue
        break
    return min(BUFFER_SIZE, end.getsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF) // 2)
