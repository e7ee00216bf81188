"""A protocol connection over a socket: what both ends do alike, with trio.

Sends messages and the descriptors that travel with them, receives them, hands each reply to the call that it answers,
and runs a handler for each of the peer's requests. Every descriptor that arrives has exactly one owner: the message
that is returned, or, on any error, nobody, and then it is closed here.

Sending never waits. What the peer has no space for yet lies in a queue, in order, and a task sends it when there is
space; a request for which the peer has too many unanswered ones lies in another, until one is answered. The queues are
bounded by the peer: while a reply lies in the first one, no requests are read, so a peer that does not read its replies
gets no more of them; and a call is not answered before it is sent.

A connection may be **outlived** by its calls (client.py): what is asked over it waits then until it is taken to another
one, and requests that had been sent are repeated there.

Handlers run eagerly, in the task of the poller (aio/eager.py, aio/poller.py): in the order of the requests, and the
next request is read when a handler is done or waits. What they wait for ends with the connection.
"""

from __future__ import annotations

import functools
import os
import socket
from collections import deque
from collections.abc import Callable, Coroutine, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Final

import trio

from memfs.contract.aio.busy_poll import BusyPoll
from memfs.contract.aio.eager import LoopTask
from memfs.contract.protocol.call import Call, Incoming, LateReply, PeerGone
from memfs.contract.protocol.connection import (
    HEADER_SIZE,
    MAX_DESCRIPTORS,
    MAX_IN_FLIGHT,
    MAX_MESSAGE,
    REPEATED,
    Connection,
    RemoteProtocolError,
    RequestId,
    Role,
    State,
    is_answered,
    is_reply,
)
from memfs.contract.protocol.custody import Custody, Datagram
from memfs.contract.protocol.messages import Message
from memfs.contract.protocol.transport import Datagrams
from memfs.contract.sys.rights import Rights, descriptors_in, space_for, to_rights
from memfs.contract.sys.unix_address import address_of

# One descriptor more than is allowed, so that too many are noticed rather than cut off.
_ANCILLARY: Final = space_for(MAX_DESCRIPTORS + 1)
_RECVMSG: Final = (MAX_MESSAGE, _ANCILLARY, int(socket.MSG_CMSG_CLOEXEC))
_MSG_CTRUNC: Final = int(socket.MSG_CTRUNC)  # an enum.IntFlag takes its time to be combined
_MSG_TRUNC: Final = int(socket.MSG_TRUNC)

#: Acts on a request and answers it. Cancelled if it waits when the connection ends
Handler = Callable[["Incoming"], Coroutine[Any, Any, object]]

_MAX_POLL: Final = 150e-6  # seconds for which nothing else runs: three times what an answer takes that comes soon
_MIN_POLL: Final = 20e-6  # seconds: long enough to yield once
_CONNECT_TIMEOUT: Final = 5.0  # seconds
_CONNECT_PAUSE: Final = 0.01  # seconds


@dataclass(slots=True)
class _Unsent:
    """A message that the peer has had no space for yet."""

    data: bytes
    rights: Rights
    call: Call


class Peer:
    """One end of a connection, whose socket it owns. `serve` must be running for anything to arrive at all.

    `custody` has the descriptors that come: those of a message are numbers that it knows. `busy_poll` is for replies.
    `outlived`: calls do not end with the connection, but when somebody calls `end_calls`, or `take_calls` of another.
    """

    __slots__ = (
        "_broken",
        "_busy_poll",
        "_calls",
        "_closed",
        "_datagrams",
        "_discard",
        "_ended",
        "_handle",
        "_handlers_ended",
        "_is_outlived",
        "_is_paused",
        "_postponed",
        "_unsent",
        "_waiting",
        "protocol",
    )

    def __init__(
        self,
        sock: socket.socket,
        role: Role,
        custody: Custody | None = None,
        busy_poll: BusyPoll | None = None,
        *,
        outlived: bool = False,
    ) -> None:
        custody = custody or Custody()
        self._datagrams: Final = Datagrams(sock, custody)
        self._discard: Final = custody.discard
        self._busy_poll: Final = busy_poll or BusyPoll(_MAX_POLL, window=_MAX_POLL, minimum=_MIN_POLL)
        self.protocol: Final = Connection(role)
        self._postponed: Final[deque[Call]] = deque()  # as many as may be are unanswered
        self._unsent: Final[deque[_Unsent]] = deque()  # the peer has had no space yet
        self._calls: Final[dict[RequestId, Call]] = {}  # that wait for their replies
        self._handle: Handler | None = None
        self._waiting: Final[set[trio.CancelScope]] = set()  # around the handlers that wait
        self._handlers_ended: Final = trio.lowlevel.ParkingLot()
        self._is_outlived = outlived
        self._is_paused = False  # whether requests are not read
        self._closed = False
        self._broken: Exception | None = None  # what has ended it
        self._ended: Final = trio.Event()

    @property
    def unsent(self) -> int:
        """How many messages the peer has had no space for yet."""
        return len(self._unsent)

    # -- sending ----------------------------------------------------------------------------------------------------

    async def call(self, message: Message, fds: Sequence[int] = (), late: LateReply | None = None) -> Incoming:
        """Send a request and wait for its reply.

        When cancelled, what was asked for happens all the same; `late` then gets the reply. Raises PeerGone;
        LocalProtocolError if it may not be sent now; OSError(EBADF) for a descriptor that is closed.
        """
        await trio.lowlevel.checkpoint_if_cancelled()  # afterwards the protocol believes that it has been sent
        return await self.post(message, fds, late=late).result()

    async def reply(self, request: RequestId, message: Message, fds: Sequence[int] = ()) -> None:
        """Answer a request of the peer's; waits until the peer has space for it. Raises PeerGone."""
        await self.post(message, fds, answers=request).wait()

    async def tell(self, message: Message) -> None:
        """Send what has no answer; waits until the peer has space for it. Raises PeerGone."""
        await self.post(message).wait()

    def post(
        self,
        message: Message,
        fds: Sequence[int] = (),
        *,
        answers: RequestId | None = None,
        late: LateReply | None = None,
    ) -> Call:
        """Send a message, or leave it to be sent when that is possible.

        `answers` is the request that it replies to. Raises PeerGone; LocalProtocolError if it may not be sent now;
        OSError(EBADF), before anything is sent, for a descriptor that is closed.
        """
        for fd in fds:
            os.get_inheritable(fd)  # raises; sendmsg(2) would as well, but then about its socket or about these?
        call = Call(self, message, fds, late, is_answered=answers is None and is_answered(message))
        has_ended = self._closed or self.protocol.state is State.CLOSED  # the final message has been sent
        if has_ended and not (call.is_answered and self._is_outlived):
            raise PeerGone("the connection has ended")
        if call.is_answered and (has_ended or self.protocol.unanswered >= MAX_IN_FLIGHT):
            self._postponed.append(call)
        else:
            self._send(call, answers)
        return call

    def _send(self, call: Call, answers: RequestId | None = None, repeats: RequestId | None = None) -> None:
        number, data = self.protocol.send(call.message, answers=answers, repeats=repeats, descriptors=len(call.fds))
        if call.is_answered:
            self._calls[number] = call
        rights = to_rights(call.fds)
        try:
            if not self._unsent and self._transmit(data, rights):
                self._sent(call)
                return
        except OSError as error:
            if call.is_answered and self._is_outlived:
                self._unreachable(error)
                return
            raise self._unreachable(error) from error
        self._unsent.append(_Unsent(data, rights, call))
        if answers is not None and not self._is_paused:
            self._is_paused = True
            self._datagrams.pause()
        if len(self._unsent) == 1:
            trio.lowlevel.spawn_system_task(self._send_rest)

    def _transmit(self, data: bytes, rights: Rights) -> bool:
        """Send a datagram. Returns whether the peer has space for it."""
        try:
            self._datagrams.send(data, rights)
        except BlockingIOError:
            return False
        return True

    def _sent(self, call: Call) -> None:
        call.is_sent = True
        if not call.is_answered:
            call.done()

    async def _send_rest(self) -> None:
        """Send what lies in the queue, whenever the peer has space for it."""
        try:
            while self._unsent:
                first = self._unsent[0]
                if self._transmit(first.data, first.rights):
                    self._unsent.popleft()
                    self._sent(first.call)
                else:
                    await self._datagrams.wait_writable()
        except trio.ClosedResourceError:
            return
        except OSError as error:
            self._unreachable(error)
            self._forget_unsent()
        self._resume()

    def _send_postponed(self) -> None:
        """Send the requests for which there are few enough unanswered ones now."""
        while self._postponed and self.protocol.unanswered < MAX_IN_FLIGHT and not self._closed:
            call = self._postponed.popleft()
            try:
                self._send(call)
            except PeerGone:
                call.done()

    def _unreachable(self, error: Exception) -> PeerGone:
        if isinstance(error, ConnectionError):
            # What it said before it went (Fenced, above all) is still there to be read; `serve` then ends.
            return PeerGone("the peer is gone")
        self.close()
        return PeerGone("the peer cannot be reached")

    def abandon(self, call: Call) -> None:
        """Forget a call that nobody waits for any more."""
        if call in self._postponed:
            self._postponed.remove(call)
        elif call.fds and not call.is_sent:  # it cannot be taken back, and its descriptors are about to be closed
            self.close()

    # -- calls that outlive their connections -----------------------------------------------------------------------

    def take_calls(self, before: Peer) -> None:
        """Repeat what was asked over a connection that has ended and was not answered, and what waits there."""
        for number, call in sorted(before._calls.items(), key=lambda each: each[0] & ~REPEATED):
            if call.is_cancelled and call.fds:  # which may be closed by now
                if call.late is None:
                    continue
                call.fds = [_nothing()] * len(call.fds)  # what was done they do not matter for, and else it fails
            self._repeat(call, number)
        self.protocol.go_on_after(before.protocol.last_id)
        for call in before._postponed:
            call.carrier = self
            self._postponed.append(call)
        before._calls.clear()
        before._postponed.clear()
        self._send_postponed()

    def _repeat(self, call: Call, number: RequestId) -> None:
        call.carrier, call.is_sent = self, False
        self._send(call, repeats=number)

    def end_calls(self) -> None:
        """End the calls that have outlived the connection: they raise PeerGone, and so do those to come."""
        self._is_outlived = False
        for call in (*self._calls.values(), *self._postponed):
            call.done()
        self._calls.clear()
        self._postponed.clear()

    # -- receiving --------------------------------------------------------------------------------------------------

    async def serve(self, handle: Handler) -> None:
        """Run a handler for each of the peer's requests, until the connection ends.

        Raises RemoteProtocolError when the peer breaks the protocol, PeerGone if the socket fails, and what `handle`
        raises. In any case the connection is closed then, calls raise PeerGone, and no handler runs any more.
        """
        self._handle = handle
        try:
            if not self._closed:
                self._read_on()
            await self._ended.wait()
        finally:
            self.close()
            await self._end_handlers()
            self._handle = None  # most likely has us
            broken, self._broken = self._broken, None  # has us, too, by its traceback
        if broken is not None:
            try:
                raise broken
            finally:
                del broken  # a cycle with its traceback

    async def exchange(self, message: Message) -> Incoming:
        """Send a request and return its reply, before `serve` reads what comes next.

        Raises PeerGone, RemoteProtocolError. If cancelled, the connection is of no more use.
        """
        call = self.post(message)
        while not call.is_done:
            await self._datagrams.wait_readable()
            try:
                received = self._receive()
            except BlockingIOError:
                continue
            if received is None:
                raise PeerGone("the connection ended before the answer")
            self._take(received[0])
        return await call.result()

    def _read_on(self) -> None:
        try:
            self._datagrams.read(self._read)
        except OSError as error:
            self._break(_unreadable(error))

    def _resume(self) -> None:
        """Read requests again."""
        if self._is_paused and not self._closed:
            self._is_paused = False
            self._read_on()

    async def _end_handlers(self) -> None:
        """Cancel the handlers that wait, and wait until they have ended."""
        for scope in self._waiting:
            scope.cancel()
        with trio.CancelScope(shield=True):
            while self._waiting:
                await self._handlers_ended.park()

    async def _read(self, task: LoopTask) -> bool:
        """Receive a message and act on it. Returns whether a task has something to do now."""
        try:
            received = self._receive()
        except BlockingIOError:
            return False
        except (OSError, RemoteProtocolError, PeerGone) as error:
            self._break(error)
            return True
        if received is None:
            self.close()
            return True
        incoming, is_reply = received
        if is_reply:
            self._take(incoming)
            return True
        await self._run_handler(incoming, task)
        return self._closed

    async def _run_handler(self, request: Incoming, task: LoopTask) -> None:
        assert self._handle is not None
        try:
            await task.run(self._handle(request), functools.partial(self._waiting.add, task.scope))
        except Exception as error:  # `serve` raises it
            self._break(error)
        finally:
            if task.is_taken:
                self._waiting.discard(task.scope)
                self._handlers_ended.unpark_all()

    def poll_for(self, call: Call) -> None:
        """Do what Call.poll says."""
        self._busy_poll.start()
        self._busy_poll.yield_first()
        self.receive_for(call)

    def receive_for(self, call: Call) -> None:
        """Receive replies until a call is done, or nothing is there and busy-polling is over, or a request is next."""
        try:
            while not (call.is_done or self._closed):
                try:
                    is_next = is_reply(self._datagrams.peek(HEADER_SIZE))
                except BlockingIOError:
                    if self._busy_poll.goes_on():
                        continue
                    return
                if not is_next:
                    return
                received = self._receive()
                if received is not None:
                    self._take(received[0])
        except ConnectionError:  # `serve` will see that, too
            pass
        except OSError as error:
            self._break(_unreadable(error))
        except (RemoteProtocolError, PeerGone) as error:
            self._break(error)

    def _take(self, reply: Incoming) -> None:
        """Hand a reply to the call that it answers."""
        self._busy_poll.stop()
        call = self._calls.pop(reply.id)
        if not call.is_sent:
            self._discard(reply.fds)
            self._break(RemoteProtocolError(f"{type(reply.message).__name__} answers what has not been sent yet"))
        elif call.is_cancelled:
            (call.late or self._drop)(reply)
        else:
            call.reply = reply
            call.done()
        if self._postponed:
            self._send_postponed()

    def _drop(self, reply: Incoming) -> None:
        self._discard(reply.fds)

    def _receive(self) -> tuple[Incoming, bool] | None:
        """Receive the next message, and whether it is a reply. None: the connection has ended.

        Raises BlockingIOError, RemoteProtocolError and PeerGone.
        """
        try:
            try:
                datagram = self._datagrams.receive(*_RECVMSG)
            except ConnectionResetError:  # said once, if it went without having read all; what it had said comes next
                datagram = self._datagrams.receive(*_RECVMSG)
        except BlockingIOError:
            raise
        except ConnectionError:
            return None
        except OSError as error:
            raise _unreadable(error) from error
        return self._accept(datagram)

    def _accept(self, datagram: Datagram) -> tuple[Incoming, bool] | None:
        data, ancillary, flags, _ = datagram
        fds = tuple(descriptors_in(ancillary)) if ancillary else ()
        if self.protocol.state is State.CLOSED:  # what crossed the final message on its way is nobody's offence
            self._discard(fds)
            return None
        try:
            return self._parse(data, flags, fds)
        except OSError as error:
            self._discard(fds)
            raise _unreadable(error) from error
        except BaseException:
            self._discard(fds)
            raise

    def _parse(self, data: bytes, flags: int, fds: tuple[int, ...]) -> tuple[Incoming, bool] | None:
        """Unpack a datagram; the descriptors are the message's if this returns one. Raises RemoteProtocolError."""
        if flags & _MSG_TRUNC or len(fds) > MAX_DESCRIPTORS:
            raise RemoteProtocolError("a message or its descriptors are larger than allowed")
        if not data:
            if fds:
                raise RemoteProtocolError("an empty message")
            return None
        # The kernel keeps back descriptors that the sender put there in excess, and those that we have no space for
        # (EMFILE). The latter is nobody's fault: the message counts, and the handler misses the descriptors.
        no_space = bool(flags & _MSG_CTRUNC)
        received = self.protocol.receive(data, None if no_space else len(fds))
        if no_space:
            self._discard(fds)
            fds = ()
        return Incoming(received.id, received.message, fds), received.answers is not None

    # -- the end ----------------------------------------------------------------------------------------------------

    def close(self) -> None:
        """End the connection; calls that wait raise PeerGone. Idempotent."""
        if self._closed:
            return
        self._closed = True
        self.protocol.close()
        self._datagrams.close()
        self._forget_unsent()
        if not self._is_outlived:
            self.end_calls()
        self._ended.set()

    def _forget_unsent(self) -> None:
        for unsent in self._unsent:
            if not (unsent.call.is_answered and self._is_outlived):
                unsent.call.done()
        self._unsent.clear()

    def _break(self, error: Exception) -> None:
        """End the connection, and have `serve` raise this."""
        self._broken = self._broken or error
        self.close()


async def open_connection(path: str) -> socket.socket:
    """Connect to a socket. Raises OSError: EAGAIN if others have filled its queue for long.

    connect(2) of such a socket is never in progress: it is done, or to be tried again. trio takes EAGAIN for done.
    """
    deadline = trio.current_time() + _CONNECT_TIMEOUT
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    try:
        sock.setblocking(False)
        while True:
            try:
                with address_of(path) as address:
                    sock.connect(address)
            except BlockingIOError:
                if trio.current_time() >= deadline:
                    raise
                await trio.sleep(_CONNECT_PAUSE)
            else:
                return sock
    except BaseException:
        sock.close()
        raise


@functools.cache
def _nothing() -> int:
    """Return a descriptor that stands for one which is closed."""
    return os.open(os.devnull, os.O_RDONLY | os.O_CLOEXEC)


def close_all(fds: Iterable[int]) -> None:
    """Close descriptors that are not needed."""
    for fd in fds:
        os.close(fd)


def _unreadable(error: OSError) -> PeerGone:
    return PeerGone(f"the peer cannot be received from: {error.strerror}")
