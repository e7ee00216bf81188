"""The pump between /dev/fuse and pyfuse3, which answers itself what pyfuse3 cannot.

pyfuse3 has no handlers for FALLOCATE, LSEEK and IOCTL, and after the first ENOSYS the kernel never asks again. But
libfuse can be given any descriptor that speaks the FUSE protocol. So the channel owns /dev/fuse and gives pyfuse3 one
end of a socketpair:

    kernel  <- /dev/fuse ->  Channel  <- SOCK_SEQPACKET ->  libfuse, pyfuse3

Requests for which there is a handler here are answered here; all others go through unchanged. An observer may look at
a request that goes through and amend the reply (INIT and OPEN must say things that pyfuse3 does not know).

Order matters: a request is handed on, or its handler called, in the order in which the kernel queued it. A handler
that can answer at once returns bytes, and has then answered before the next request is looked at. One that may have to
wait returns a coroutine; it runs in the task that read the request, and if it does wait, another task reads on. So what
does not wait costs no task, and a RELEASE is seen before the SETXATTR that follows it.

A handler that waits is cancelled when the kernel says that its caller was interrupted (FUSE_INTERRUPT), and the caller
gets EINTR; whoever has begun something that must be finished shields it (File does).

Rejected: a thread for the pump (two wake-ups across CPUs for each request, and the handlers share state with
pyfuse3's); patching pyfuse3 (the channel needs only the kernel's stable ABI and libfuse's /dev/fd feature).
"""

from __future__ import annotations

import contextvars
import errno
import logging
import os
import socket
import types
from collections.abc import Callable, Coroutine, Generator
from typing import Any, Final

import trio

from memfs.contract.logs import fields, working_on
from memfs.fuse.abi import (
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

log = logging.getLogger(__name__)

#: Answers a request: with the reply (header included), with a coroutine that returns it, or with None for no reply.
#: The request's body is there until the coroutine waits
Handler = Callable[[Request], "bytes | Coroutine[Any, Any, bytes] | None"]
#: Changes a successful reply of pyfuse3 in place: gets the whole reply, header included
Amendment = Callable[[bytearray], None]
#: Sees a request that goes on to pyfuse3, and may return an amendment of its reply
Observer = Callable[[Request], "Amendment | None"]

_SO_SNDBUFFORCE: Final = 32
_BURST: Final = 32  # requests before other tasks get a turn
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
        self._waiting: dict[int, trio.CancelScope] = {}  # by unique: requests whose handlers wait
        self._buffer: Final = memoryview(bytearray(BUFFER_SIZE))
        self._turns = _BURST  # requests until other tasks get a turn
        self._looks = 0  # for another request before we sleep
        os.set_blocking(fuse_fd, False)
        self._ours, self._libfuse = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self.max_message: Final = min(_fit_buffer(self._ours), _fit_buffer(self._libfuse))
        self._ours.setblocking(False)

    def hand_over(self) -> int:
        """The descriptor for libfuse to use (as /dev/fd/N) and to close."""
        return self._libfuse.detach()

    async def run(self, unmounted: Callable[[], None]) -> None:
        """Pump until cancelled, or until the filesystem is unmounted; then call `unmounted` and return."""
        context = contextvars.copy_context()  # not that of the request which a task was answering
        async with trio.open_nursery() as nursery:

            def read_on() -> None:
                context.run(nursery.start_soon, self._requests, read_on, nursery.cancel_scope.cancel)

            nursery.start_soon(self._replies)
            read_on()
        unmounted()

    def close(self) -> None:
        """Close all descriptors. The kernel then aborts whatever it waits for."""
        self._ours.close()
        self._libfuse.close()
        os.close(self._fuse)

    # -- kernel to libfuse ------------------------------------------------------------------------------------------

    async def _requests(self, read_on: Callable[[], None], end: Callable[[], None]) -> None:
        """Read and answer requests until one of them has to wait. Then this task is that one's.

        `read_on` starts another task for the next ones. `end` ends them all, when the filesystem is unmounted.
        """
        turn = _Turn(read_on)
        with turn.scope:
            while turn.request is None:
                data = await self._next()
                if data is None:
                    end()
                    return
                await self._serve(data, turn)
        request = turn.request
        if request is not None and turn.scope.cancelled_caught:
            self._answer(invalidate_attributes(request.nodeid))  # a part of it may have been done
            self._answer(error_reply(request.unique, errno.EINTR))
            with working_on(request.unique):
                _log_answer(request, errno.EINTR)

    async def _next(self) -> memoryview | None:
        """The next request, as the kernel put it; None when there will be none."""
        while True:
            try:
                length = os.readv(self._fuse, [self._buffer])
            except BlockingIOError:
                # Who has been answered often asks again at once, and to sleep and be woken takes longer than to look a
                # few times. Not so when somebody else has to answer: that needs the event loop.
                if self._looks:
                    self._looks -= 1
                    os.sched_yield()
                else:
                    await trio.lowlevel.wait_readable(self._fuse)
                    self._turns = _BURST
            except InterruptedError:
                continue
            except OSError as error:
                if error.errno == errno.ENODEV:  # unmounted
                    return None
                if error.errno != errno.ENOENT:  # the request was interrupted before we read it
                    raise
            else:
                self._turns -= 1
                if not self._turns:
                    await trio.lowlevel.checkpoint()
                    self._turns = _BURST
                return self._buffer[:length]

    async def _serve(self, data: memoryview, turn: _Turn) -> None:
        """Answer a request or hand it on."""
        self._looks = 0
        try:
            request = Request.parse(data)
        except Malformed as error:
            log.error("from the kernel: %s", error)  # noqa: TRY400
            if len(data) >= IN_HEADER.size:
                self._answer(error_reply(IN_HEADER.unpack_from(data)[2], errno.EIO))
            return
        handler = self._handlers.get(request.opcode)
        answer: bytes | None = None
        try:
            if request.opcode == Opcode.INTERRUPT and self._interrupt(request):
                return
            if handler is None:
                self._observe(request)
            else:
                with working_on(request.unique):
                    reply = handler(request)
                    answer = await self._result(reply, request, turn) if isinstance(reply, Coroutine) else reply
        except Exception as error:
            answer = self._failure(request.unique, request.opcode, error)
        else:
            if handler is None:
                await self._forward(data)
                return
        if answer is not None:
            self._answer(answer)
        if turn.request is None:
            self._looks = _LOOKS

    async def _result(self, work: Coroutine[Any, Any, bytes], request: Request, turn: _Turn) -> bytes:
        """What a handler comes to, even if it waits; its INTERRUPT may be the next that is read then."""

        def waits() -> None:
            turn.request = request
            self._waiting[request.unique] = turn.scope
            turn.read_on()

        try:
            answer = await _calling(waits, work)
        except Exception as error:
            answer = self._failure(request.unique, request.opcode, error)
        finally:
            self._waiting.pop(request.unique, None)
        _log_answer(request, -OUT_HEADER.unpack_from(answer)[1])
        return answer

    def _observe(self, request: Request) -> None:
        observer = self._observers.get(request.opcode)
        amendment = observer(request) if observer is not None else None
        if amendment is not None:
            self._amend_next[request.unique] = amendment

    def _interrupt(self, request: Request) -> bool:
        """Whether the interrupted request is one of ours; then it is being cancelled."""
        (unique,) = unpack(INTERRUPT_IN, request.body)
        scope = self._waiting.get(unique)
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


class _Turn:
    """A task that reads requests, and the one that it has come to wait for, if it has."""

    __slots__ = ("read_on", "request", "scope")

    def __init__(self, read_on: Callable[[], None]) -> None:
        self.read_on: Final = read_on
        self.scope: Final = trio.CancelScope()
        self.request: Request | None = None


@types.coroutine
def _calling(waits: Callable[[], None], work: Coroutine[Any, Any, bytes]) -> Generator[Any, Any, bytes]:
    """Await a coroutine, and call `waits` when it waits for the first time."""
    try:
        trap = work.send(None)
        waits()
        while True:
            try:
                resumed_with = yield trap
            except BaseException as error:
                trap = work.throw(error)
            else:
                trap = work.send(resumed_with)
    except StopIteration as end:
        return bytes(end.value)


def _log_answer(request: Request, error: int) -> None:
    if log.isEnabledFor(logging.INFO):
        log.info("answered", extra=fields(opcode=request.opcode, error=error))


def _fit_buffer(end: socket.socket) -> int:
    """Make room for the largest request, as far as we may (socket(7)). Returns the largest message that fits, bytes."""
    for option in (_SO_SNDBUFFORCE, socket.SO_SNDBUF):
        try:
            end.setsockopt(socket.SOL_SOCKET, option, 2 * BUFFER_SIZE)
        except PermissionError:
            continue
        break
    return min(BUFFER_SIZE, end.getsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF) // 2)
