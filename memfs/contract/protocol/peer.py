"""A protocol connection over a socket: what both ends do alike, with trio.

Sends messages and the descriptors that travel with them, receives them, hands each reply to whoever asked, and has the
peer's requests handled. Every descriptor that arrives is owned by exactly one: by the message that is returned, or, on
any error, by nobody, and then it is closed here.
"""

from __future__ import annotations

import array
import os
import socket
import time
from collections.abc import Callable, Coroutine, Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any, Final

import trio

from memfs.contract.faults import Point, reach_at_once
from memfs.contract.protocol.connection import (
    HEADER_SIZE,
    MAX_DESCRIPTORS,
    MAX_IN_FLIGHT,
    MAX_MESSAGE,
    Connection,
    RemoteProtocolError,
    RequestId,
    Role,
    State,
    is_reply,
)
from memfs.contract.protocol.messages import Message
from memfs.contract.protocol.transport import Datagram, Datagrams

# One descriptor more than is allowed, so that too many are noticed rather than cut off.
_ANCILLARY: Final = socket.CMSG_SPACE((MAX_DESCRIPTORS + 1) * array.array("i").itemsize)
_RECVMSG: Final = (MAX_MESSAGE, _ANCILLARY, int(socket.MSG_CMSG_CLOEXEC))
_MSG_CTRUNC: Final = int(socket.MSG_CTRUNC)  # an enum.IntFlag takes its time to be combined
_MSG_TRUNC: Final = int(socket.MSG_TRUNC)

#: Acts on a request; what it returns, if anything, has to be awaited before the next one
Handler = Callable[["Incoming"], "Coroutine[Any, Any, None] | None"]

_Rights = tuple[int, int, Any]  # one piece of sendmsg's ancillary data

_CONNECT_TIMEOUT: Final = 5.0  # seconds
_CONNECT_PAUSE: Final = 0.01  # seconds


class PeerGone(Exception):
    """The connection has ended: the peer closed it, died, or broke the protocol."""


@dataclass(frozen=True, slots=True)
class Incoming:
    """A message and the descriptors that came with it; whoever gets this owns them and must close them.

    There are none, whatever was sent, if this process had no room for them (EMFILE).
    """

    id: RequestId
    message: Message
    fds: tuple[int, ...]


@dataclass(slots=True)
class _Call:
    """A request of ours. It is `done` when its reply is there, or when there will be none."""

    done: trio.Event = field(default_factory=trio.Event)
    reply: Incoming | None = None
    cancelled: bool = False


class Peer:
    """One end of a connection. `serve` must be running for anything to arrive at all.

    `discard` closes descriptors that nobody wants, and the socket; who does not trust the peer lets a thread do that
    (owners/admission.py).
    """

    __slots__ = (
        "_answered",
        "_before_more",
        "_broken",
        "_calls",
        "_closed",
        "_discard",
        "_socket",
        "_stopped",
        "_unsent",
        "_unsent_lock",
        "protocol",
    )

    def __init__(
        self,
        sock: trio.socket.SocketType,
        role: Role,
        discard: Callable[[tuple[int, ...]], object] | None = None,
    ) -> None:
        self._socket: Final = Datagrams(sock)
        self._discard: Final = discard or close_all
        self.protocol: Final = Connection(role)
        self._unsent: tuple[bytes, list[_Rights]] | None = None  # what the peer has had no room for yet
        self._unsent_lock: Final = trio.Lock()  # of who waits for that room
        self._calls: dict[RequestId, _Call] = {}
        self._answered = trio.Event()  # replaced each time it is set
        self._closed = False
        self._broken: Exception | None = None  # what has ended it
        self._stopped = trio.Event()  # set when nothing is read any more; replaced when it is
        self._before_more: Coroutine[Any, Any, None] | None = None  # what has to be awaited then

    async def call(self, message: Message, fds: Sequence[int] = ()) -> Incoming:
        """Send a request and wait for its reply. Raises PeerGone; LocalProtocolError if it may not be sent now.

        Waits first while as many as may be are unanswered. When cancelled after that, the request stays sent; its reply
        is dropped when it comes. Not so if it has come: who was held up (a process that was stopped) finds a deadline
        passed and the answer, which was in time, not yet read.
        """
        call = _Call()
        await self._send(message, fds=fds, call=call)
        return await self._result(call)

    def ask(self, message: Message, patience: float) -> Incoming | Coroutine[Any, Any, Incoming]:
        """`call`, done as far as can be without waiting: its reply, if that comes within so many seconds.

        Else what has to be awaited for it. To sleep and be woken takes longer than many an answer does.
        """
        call = _Call()
        if not self._post(message, call=call):
            return self.call(message)
        if patience:
            self._look_for(call, patience)
        return call.reply or self._result(call)

    async def _result(self, call: _Call) -> Incoming:
        try:
            await self._flush()
            if not call.done.is_set():
                await call.done.wait()
        except trio.Cancelled:
            self._look_for(call, 0)
            if call.reply is None:
                call.cancelled = True
                raise
        if call.reply is None:
            raise PeerGone("the connection ended before the answer")
        return call.reply

    async def reply(self, request: RequestId, message: Message, fds: Sequence[int] = ()) -> None:
        """Answer a request of the peer's. Raises PeerGone."""
        await self._send(message, answers=request, fds=fds)

    def reply_now(self, request: RequestId, message: Message) -> Coroutine[Any, Any, None] | None:
        """`reply`, done as far as can be without waiting; what is returned, if anything, has to be awaited."""
        return self._send_now(message, request)

    async def tell(self, message: Message) -> None:
        """Send what has no answer. Raises PeerGone."""
        await self._send(message)

    def tell_now(self, message: Message) -> Coroutine[Any, Any, None] | None:
        """`tell`, done as far as can be without waiting; what is returned, if anything, has to be awaited."""
        return self._send_now(message)

    async def serve(self, handle: Handler) -> None:
        """Have the peer's requests handled, in order, until the connection ends.

        Raises RemoteProtocolError when the peer breaks the protocol, PeerGone if the socket fails, and what `handle`
        raises. The connection is closed in any case, and calls that wait raise PeerGone.
        """

        def readable() -> bool:
            return self._read(handle)

        try:
            while not self._closed:
                try:
                    self._socket.read(readable)
                except OSError as error:
                    raise _deaf(error) from error
                await self._stopped.wait()
                self._stopped = trio.Event()
                if self._before_more is not None:
                    before_more, self._before_more = self._before_more, None
                    with suppress(PeerGone):
                        await before_more
            if self._broken is not None:
                raise self._broken
        finally:
            self.close()
            if self._before_more is not None:
                self._before_more.close()

    def _read(self, handle: Handler) -> bool:
        """Receive a message and act on it. Returns whether a task has something to do now."""
        try:
            received = self._receive()
            if received is None:
                self.close()
            elif received[1]:
                self._take(received[0])
            else:
                self._before_more = handle(received[0])
                if self._before_more is None:
                    return False
                self._socket.pause()
                self._stopped.set()
        except BlockingIOError:
            return False
        except Exception as error:  # `serve` raises it
            self._break(error)
        return True

    def _look_for(self, call: _Call, patience: float) -> None:
        """Take replies for so many seconds, until a certain one or a request has come."""
        deadline = time.perf_counter() + patience
        while not call.done.is_set():
            try:
                if not is_reply(self._socket.peek_within(deadline - time.perf_counter(), HEADER_SIZE)):
                    return
                received = self._receive()
            except (ConnectionError, trio.ClosedResourceError):  # `serve` will see that, too
                return
            except (RemoteProtocolError, PeerGone) as error:
                self._break(error)
            except OSError as error:
                self._break(_deaf(error))
            else:
                if received is not None:
                    self._take(received[0])

    def _break(self, error: Exception) -> None:
        """`serve` is to end with this."""
        self._broken = error
        self.close()

    def _take(self, reply: Incoming) -> None:
        """Hand a reply to whoever asked."""
        self._wake()
        call = self._calls.pop(reply.id)
        if call.cancelled:
            self._discard(reply.fds)
        else:
            call.reply = reply
            call.done.set()

    def close(self) -> None:
        """End the connection; calls that wait raise PeerGone. Idempotent."""
        if self._closed:
            return
        self._closed = True
        self.protocol.close()
        self._socket.close(self._discard)
        for call in self._calls.values():
            call.done.set()
        self._calls.clear()
        self._wake()
        self._stopped.set()

    def _wake(self) -> None:
        self._answered.set()
        self._answered = trio.Event()

    async def _send(
        self,
        message: Message,
        *,
        answers: RequestId | None = None,
        fds: Sequence[int] = (),
        call: _Call | None = None,
    ) -> None:
        await trio.lowlevel.checkpoint_if_cancelled()  # afterwards the protocol believes that it has been sent
        while not self._post(message, answers=answers, fds=fds, call=call):
            if self._unsent is None:
                await self._answered.wait()
            await self._flush()
        await self._flush()

    def _send_now(self, message: Message, answers: RequestId | None = None) -> Coroutine[Any, Any, None] | None:
        if not self._post(message, answers=answers):
            return self._send(message, answers=answers)
        return self._flush() if self._unsent is not None else None

    def _post(
        self,
        message: Message,
        *,
        answers: RequestId | None = None,
        fds: Sequence[int] = (),
        call: _Call | None = None,
    ) -> bool:
        """Send, or leave it to be flushed. False: not now, for the peer has not taken or answered what came before."""
        if self._closed or self.protocol.state is State.CLOSED:  # the last word has been said
            raise PeerGone("the connection has ended")
        if self._unsent is not None or (call is not None and self.protocol.unanswered >= MAX_IN_FLIGHT):
            return False
        number, data = self.protocol.send(message, answers=answers, descriptors=len(fds))
        if call is not None:
            self._calls[number] = call
        rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", fds))] if fds else []
        try:
            reach_at_once(Point.BEFORE_SEND)
            self._socket.sendmsg_now([data], rights)
            reach_at_once(Point.AFTER_SEND)
        except BlockingIOError:
            self._unsent = data, rights
        except (OSError, trio.ClosedResourceError) as error:
            raise self._unreachable(error) from error
        return True

    async def _flush(self) -> None:
        """Wait until the peer has had room for all that was posted. Raises PeerGone."""
        while self._unsent is not None:
            async with self._unsent_lock:
                if self._unsent is None:
                    return
                data, rights = self._unsent
                try:
                    await self._socket.sendmsg([data], rights)
                except trio.Cancelled:  # the peer does not read, and we cannot take the message back
                    self.close()
                    raise
                except (OSError, trio.ClosedResourceError) as error:
                    raise self._unreachable(error) from error
                finally:
                    self._unsent = None

    def _unreachable(self, error: Exception) -> PeerGone:
        if isinstance(error, ConnectionError):
            # What it said before it went (Fenced, above all) is still there to be read; `serve` then ends.
            return PeerGone("the peer is gone")
        self.close()
        return PeerGone("the peer cannot be reached")

    def _receive(self) -> tuple[Incoming, bool] | None:
        """The next message, and whether it is a reply. None: the connection has ended. Raises BlockingIOError."""
        try:
            reach_at_once(Point.BEFORE_RECEIVE)
            try:
                datagram = self._socket.recvmsg_now(*_RECVMSG)
            except ConnectionResetError:  # said once, if it went without having read all; what it had said comes next
                datagram = self._socket.recvmsg_now(*_RECVMSG)
        except BlockingIOError:
            raise
        except (ConnectionError, trio.ClosedResourceError):
            return None
        except OSError as error:
            raise _deaf(error) from error
        return self._accept(datagram)

    def _accept(self, datagram: Datagram) -> tuple[Incoming, bool] | None:
        data, ancillary, flags, _ = datagram
        fds = tuple(_descriptors(ancillary)) if ancillary else ()
        if self.protocol.state is State.CLOSED:  # what crossed the last word on its way is nobody's offence
            self._discard(fds)
            return None
        # The kernel keeps back descriptors that the sender put there in excess, and those that we have no room for
        # (EMFILE). The latter is nobody's fault: the message counts, and whoever needs the descriptors misses them.
        no_room = bool(flags & _MSG_CTRUNC) and len(fds) <= MAX_DESCRIPTORS
        try:
            reach_at_once(Point.AFTER_RECEIVE)
            if flags & _MSG_TRUNC or len(fds) > MAX_DESCRIPTORS:
                raise RemoteProtocolError("a message or its descriptors are larger than allowed")
            if not data:
                if fds:
                    raise RemoteProtocolError("an empty message")
                return None
            received = self.protocol.receive(data, None if no_room else len(fds))
        except OSError as error:
            self._discard(fds)
            raise _deaf(error) from error
        except BaseException:
            self._discard(fds)
            raise
        if no_room:
            self._discard(fds)
            fds = ()
        return Incoming(received.id, received.message, fds), received.answers is not None


async def open_connection(path: str) -> trio.socket.SocketType:
    """Connect to a socket. Raises OSError: EAGAIN if others have filled its queue for long.

    connect(2) of such a socket is never in progress: it is done, or to be tried again. trio takes EAGAIN for done.
    """
    deadline = trio.current_time() + _CONNECT_TIMEOUT
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    try:
        sock.setblocking(False)
        while True:
            try:
                sock.connect(path)
            except BlockingIOError:
                if trio.current_time() >= deadline:
                    raise
                await trio.sleep(_CONNECT_PAUSE)
            else:
                return trio.socket.from_stdlib_socket(sock)
    except BaseException:
        sock.close()
        raise


def close_all(fds: Iterable[int]) -> None:
    """Close descriptors that nobody wants."""
    for fd in fds:
        os.close(fd)


def _deaf(error: OSError) -> PeerGone:
    return PeerGone(f"the peer cannot be heard: {error.strerror}")


def _descriptors(ancillary: list[tuple[int, int, bytes]]) -> Iterator[int]:
    for level, kind, data in ancillary:
        if (level, kind) == (socket.SOL_SOCKET, socket.SCM_RIGHTS):
            numbers = array.array("i")
            numbers.frombytes(data[: len(data) - len(data) % numbers.itemsize])
            yield from numbers
