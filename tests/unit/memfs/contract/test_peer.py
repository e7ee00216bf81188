"""Two peers on a real socket: calls, descriptors that are never leaked, and ends that die or lie."""

from __future__ import annotations

import array
import contextlib
import errno
import gc
import os
import socket
import struct
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager

import pytest
import trio
from trio.testing import wait_all_tasks_blocked

from memfs import garbage
from memfs.contract.aio.busy_poll import BusyPoll
from memfs.contract.aio.poller import Poller
from memfs.contract.protocol.call import Incoming, PeerGone
from memfs.contract.protocol.connection import (
    MAX_IN_FLIGHT,
    MAX_MESSAGE,
    Connection,
    LocalProtocolError,
    RemoteProtocolError,
    Role,
)
from memfs.contract.protocol.messages import (
    Ack,
    Done,
    Failed,
    Fallocate,
    FileId,
    Hello,
    HelloReply,
    InvalidateBegin,
    Message,
    Register,
    Registered,
    Unregister,
)
from memfs.contract.protocol.peer import Handler, Peer, close_all
from memfs.contract.units import PageIndex, PageRange
from tests.helpers import datagram

RANGE = PageRange(PageIndex(0), PageIndex(1))


def descriptors() -> set[str]:
    Poller.here()  # has one of its own; and so had each of the tests before
    gc.collect()
    return set(os.listdir("/proc/self/fd"))


class End:
    """One peer, its requests taken by a task."""

    def __init__(self, peer: Peer) -> None:
        self.peer = peer
        self.requests: list[Incoming] = []
        self.handle: Handler = self.keep
        self.error: Exception | None = None
        self.ended = trio.Event()
        self.scope = trio.CancelScope()

    async def keep(self, request: Incoming) -> None:
        self.requests.append(request)

    async def run(self) -> None:
        try:
            with self.scope:
                await self.peer.serve(lambda request: self.handle(request))
        except (RemoteProtocolError, ZeroDivisionError) as error:
            self.error = error
        self.ended.set()

    async def request(self, number: int = 0) -> Incoming:
        await wait_all_tasks_blocked()
        return self.requests[number]


@asynccontextmanager
async def two_ends() -> AsyncIterator[tuple[End, End]]:
    """An owner and a store that have greeted each other."""
    before = descriptors()
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    owner, store = End(Peer(ours, Role.OWNER)), End(Peer(theirs, Role.STORE))
    async with trio.open_nursery() as nursery:
        nursery.start_soon(owner.run)
        nursery.start_soon(store.run)
        nursery.start_soon(owner.peer.call, Hello())
        hello = await store.request()
        await store.peer.reply(hello.id, HelloReply(2, 4096))
        await wait_all_tasks_blocked()  # it has arrived
        store.requests.clear()
        yield owner, store
        owner.peer.close()
        store.peer.close()
        nursery.cancel_scope.cancel()
    assert descriptors() == before


@asynccontextmanager
async def raw_end(room: int | None = None) -> AsyncIterator[tuple[trio.socket.SocketType, End]]:
    """A socket of which nothing good is to be expected, and a store. `room`: bytes for what has not been read."""
    before = descriptors()
    raw, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    ours = trio.socket.from_stdlib_socket(raw)
    if room is not None:
        theirs.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, room)
    store = End(Peer(theirs, Role.STORE))
    async with trio.open_nursery() as nursery:
        nursery.start_soon(store.run)
        with ours:
            yield ours, store
        nursery.cancel_scope.cancel()
    assert descriptors() == before


async def test_calls_are_answered_out_of_order() -> None:
    async with two_ends() as (owner, store):
        answers: list[tuple[int, Message]] = []

        async def ask(number: int) -> None:
            answers.append((number, (await owner.peer.call(Unregister(FileId(number)))).message))

        async with trio.open_nursery() as nursery:
            for number in range(3):
                nursery.start_soon(ask, number)
                await wait_all_tasks_blocked()
            for index in (2, 0, 1):
                await store.peer.reply(store.requests[index].id, Done())
                await wait_all_tasks_blocked()
        assert answers == [(2, Done()), (0, Done()), (1, Done())]


async def test_descriptors_arrive_and_are_the_receiver_s() -> None:
    async with two_ends() as (owner, store), trio.open_nursery() as nursery:
        end, other = os.pipe()

        async def register() -> None:
            reply = await owner.peer.call(Register(), [other])
            assert isinstance(reply.message, Registered)
            assert not any(os.get_inheritable(fd) for fd in reply.fds)
            assert len(reply.fds) == 2
            close_all(reply.fds)

        nursery.start_soon(register)
        request = await store.request()
        assert os.fstat(request.fds[0]).st_ino == os.fstat(other).st_ino
        assert not os.get_inheritable(request.fds[0])
        await store.peer.reply(request.id, Registered(FileId(1), 2, 3, 4), [end, end])
        close_all((end, other, *request.fds))


async def test_reply_that_nobody_waits_for_is_dropped_with_its_descriptors() -> None:
    async with two_ends() as (owner, store):
        end, other = os.pipe()
        with trio.CancelScope() as scope:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(owner.peer.call, Register(), [other])
                request = await store.request()
                scope.cancel()
        await store.peer.reply(request.id, Registered(FileId(1), 2, 3, 4), [end])
        await wait_all_tasks_blocked()
        close_all((end, other, *request.fds))
        async with trio.open_nursery() as nursery:  # and the connection is unharmed
            nursery.start_soon(owner.peer.call, Unregister(FileId(1)))
            request = await store.request(1)
            await store.peer.reply(request.id, Done())


@pytest.mark.parametrize("who", ["peer", "self"])
async def test_calls_end_with_the_connection(who: str) -> None:
    async with two_ends() as (owner, store):
        gone = 0

        async def ask() -> None:
            nonlocal gone
            with pytest.raises(PeerGone):
                await owner.peer.call(Unregister(FileId(1)))
            gone += 1

        async with trio.open_nursery() as nursery:
            nursery.start_soon(ask)
            nursery.start_soon(ask)
            await wait_all_tasks_blocked()
            (store if who == "peer" else owner).peer.close()
        assert gone == 2
        await owner.ended.wait()
        await store.ended.wait()
        assert (owner.error, store.error) == (None, None)
        for attempt in (owner.peer.call(Unregister(FileId(1))), store.peer.call(Fallocate(FileId(1), RANGE))):
            with pytest.raises(PeerGone):
                await attempt
        owner.peer.close()


async def test_what_may_not_be_sent_harms_nothing() -> None:
    async with two_ends() as (owner, store):
        for wrong in (owner.peer.call(Hello()), owner.peer.call(Register()), owner.peer.tell(Done())):
            with pytest.raises(LocalProtocolError):
                await wrong
        async with trio.open_nursery() as nursery:
            nursery.start_soon(owner.peer.call, Unregister(FileId(1)))
            request = await store.request()
            await store.peer.reply(request.id, Done())


async def test_more_calls_than_may_be_in_flight_wait_their_turn() -> None:
    """A slow owner of many files, all of which are punched at once, is not our protocol error."""
    async with two_ends() as (owner, store):
        async with trio.open_nursery() as nursery:
            for number in range(MAX_IN_FLIGHT + 50):
                nursery.start_soon(store.peer.call, InvalidateBegin(FileId(number), RANGE))
            await wait_all_tasks_blocked()
            assert len(owner.requests) == MAX_IN_FLIGHT
            answered = 0
            while answered < MAX_IN_FLIGHT + 50:
                await wait_all_tasks_blocked()
                for request in owner.requests[answered:]:
                    await owner.peer.reply(request.id, Ack())
                    answered += 1
        assert sorted(request.message.file for request in owner.requests) == list(range(MAX_IN_FLIGHT + 50))  # type: ignore[attr-defined]


async def test_calls_that_wait_their_turn_end_with_the_connection() -> None:
    async with two_ends() as (owner, store), trio.open_nursery() as nursery:
        gone: list[int] = []

        async def invalidate(number: int) -> None:
            with pytest.raises(PeerGone):
                await store.peer.call(InvalidateBegin(FileId(number), RANGE))
            gone.append(number)

        for number in range(MAX_IN_FLIGHT + 50):
            nursery.start_soon(invalidate, number)
        await wait_all_tasks_blocked()
        owner.peer.close()
        await wait_all_tasks_blocked()
        assert len(gone) == MAX_IN_FLIGHT + 50


HELLO = datagram(Hello.TYPE, struct.pack("<HH16x", 2, 2))


@pytest.mark.parametrize(
    ("data", "fds"),
    [
        (b"x", 0),
        (HELLO[:-1], 0),
        (HELLO + b"\xff", 0),
        (HELLO, 1),
        (datagram(Register.TYPE), 1),
        (datagram(99), 0),
        (b"\0" * (MAX_MESSAGE + 1), 0),
        (HELLO, 3),
        (HELLO, 30),
        (b"x", 2),
    ],
)
async def test_broken_message_ends_the_connection_and_leaks_nothing(data: bytes, fds: int) -> None:
    async with raw_end() as (ours, store):
        rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", [0] * fds))] if fds else []
        await ours.sendmsg([data], rights)
        await store.ended.wait()
        assert isinstance(store.error, RemoteProtocolError)
        assert store.requests == []
        assert await ours.recv(1) == b""
        with pytest.raises(PeerGone):
            await store.peer.call(Fallocate(FileId(1), RANGE))


async def test_broken_message_later_on_ends_the_connection_too() -> None:
    async with raw_end() as (ours, store):
        await ours.send(HELLO)
        request = await store.request()
        await store.peer.reply(request.id, HelloReply(2, 4096))
        await ours.send(HELLO)
        await store.ended.wait()
        assert isinstance(store.error, RemoteProtocolError)


async def test_peer_that_does_not_read_can_be_given_up() -> None:
    async with raw_end() as (ours, store):
        await ours.send(HELLO)
        await store.peer.reply((await store.request()).id, HelloReply(2, 4096))
        ours.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1)

        async def notify() -> None:
            with pytest.raises(PeerGone):
                await store.peer.call(Fallocate(FileId(1), RANGE))

        async with trio.open_nursery() as nursery:
            for _ in range(MAX_IN_FLIGHT):
                nursery.start_soon(notify)
            await wait_all_tasks_blocked()
            ours.close()
        await store.ended.wait()


async def test_who_does_not_read_the_answers_is_asked_no_more_questions() -> None:
    """Or its answers would fill our memory; and when it does read, they are all there, in order."""
    async with raw_end() as (ours, store):
        await ours.send(HELLO)
        await store.peer.reply((await store.request()).id, HelloReply(2, 4096))
        assert len(await ours.recv(64)) > 0
        large = Failed(errno.EINVAL, "x" * 500)
        store.handle = lambda request: store.peer.reply(request.id, large)
        sent = 0
        with contextlib.suppress(BlockingIOError), socket.fromfd(ours.fileno(), ours.family, ours.type) as same:
            while True:  # until no more is taken
                await wait_all_tasks_blocked()
                same.send(datagram(Unregister.TYPE, struct.pack("<Q", 1), number=sent + 2), socket.MSG_DONTWAIT)
                sent += 1
                assert sent < 10_000
        received: list[int] = []
        while len(received) < sent:
            received.append(struct.unpack_from("<HHIQ", await ours.recv(1024))[3])
        assert received == list(range(2, sent + 2))
        ours.close()
        await store.ended.wait()
        assert store.error is None


async def test_messages_that_are_not_taken_at_once_keep_their_order() -> None:
    async with raw_end(room=1) as (ours, store):
        await ours.send(HELLO)
        await store.peer.reply((await store.request()).id, HelloReply(2, 4096))
        await ours.recv(64)
        async with trio.open_nursery() as nursery:
            for _ in range(50):
                nursery.start_soon(store.peer.call, Fallocate(FileId(1), RANGE))
            await wait_all_tasks_blocked()
            assert store.peer.unsent > 0, "they all went out: the test tests nothing"
            numbers = [struct.unpack_from("<HHIQ", await ours.recv(64))[3] for _ in range(50)]
            nursery.cancel_scope.cancel()
        assert numbers == list(range(1, 51))


# -- looking for a reply before sleeping -------------------------------------------------------------------------------


@contextlib.contextmanager
def owner_in_a_thread(end: socket.socket, answers: Callable[[Connection, int], list[bytes]]) -> Iterator[None]:
    """Greets, and answers the first request that comes with what it is told to: nothing here need run for that."""

    def run() -> None:
        protocol = Connection(Role.OWNER)
        end.send(protocol.send(Hello())[1])
        protocol.receive(end.recv(MAX_MESSAGE))
        request = protocol.receive(end.recv(MAX_MESSAGE))
        for answer in answers(protocol, request.id):
            end.send(answer)

    thread = threading.Thread(target=run)
    thread.start()
    try:
        yield
    finally:
        thread.join()


async def asked(peer: Peer, message: Message) -> Incoming:
    call = peer.post(message)
    call.poll()
    return await call.result()


@asynccontextmanager
async def store_of(answers: Callable[[Connection, int], list[bytes]], patience: float = 5) -> AsyncIterator[End]:
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    store = End(Peer(theirs, Role.STORE, busy_poll=BusyPoll(patience, window=patience)))
    with ours, owner_in_a_thread(ours, answers):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(store.run)
            while not store.requests:  # noqa: ASYNC110
                await trio.sleep(0.001)
            await store.peer.reply(store.requests.pop().id, HelloReply(2, 4096))
            yield store
            nursery.cancel_scope.cancel()


async def test_reply_is_taken_before_anything_else_runs() -> None:
    ran: list[str] = []

    async def other() -> None:
        ran.append("other")

    async with store_of(lambda protocol, number: [protocol.send(Ack(), answers=number)[1]]) as store:  # type: ignore[arg-type]
        async with trio.open_nursery() as nursery:
            nursery.start_soon(other)
            call = store.peer.post(InvalidateBegin(FileId(1), RANGE))
            call.poll()
            assert call.is_done
            assert call.reply is not None
            assert call.reply.message == Ack()
            await trio.lowlevel.checkpoint_if_cancelled()
            assert not ran, "somebody else ran while a reply was looked for"
        assert store.peer.protocol.unanswered == 0


async def test_request_that_comes_first_is_left_to_who_takes_requests() -> None:
    def answers(protocol: Connection, number: int) -> list[bytes]:
        return [protocol.send(Unregister(FileId(7)))[1], protocol.send(Ack(), answers=number)[1]]  # type: ignore[arg-type]

    async with store_of(answers) as store:
        reply = await asked(store.peer, InvalidateBegin(FileId(1), RANGE))
        assert reply.message == Ack()
        assert [request.message for request in store.requests] == [Unregister(FileId(7))]


async def test_bad_reply_ends_the_call_and_the_requests() -> None:
    def answers(protocol: Connection, number: int) -> list[bytes]:
        good = protocol.send(Ack(), answers=number)[1]  # type: ignore[arg-type]
        return [good + b"more than it says"]

    async with store_of(answers) as store:
        with pytest.raises(PeerGone):
            await asked(store.peer, InvalidateBegin(FileId(1), RANGE))
        await store.ended.wait()
        assert isinstance(store.error, RemoteProtocolError)


async def test_what_breaks_it_while_serving_is_cancelled_is_kept_by_nobody() -> None:
    """An error has the frames that it came through, which have the peer."""
    gc.collect()
    gc.disable()
    try:
        async with store_of(lambda _, __: [datagram(Ack.TYPE, b"more", number=1)]) as store:
            call = store.peer.post(InvalidateBegin(FileId(1), RANGE))
            store.scope.cancel()
            call.poll()
            await store.ended.wait()
            assert store.error is None
            del store.handle  # a cycle of the test's own
        del store, call
        garbage.check()
    finally:
        gc.enable()


async def test_owner_that_does_not_answer_is_not_looked_for_any_longer() -> None:
    async with store_of(lambda _, __: [], patience=0.01) as store:
        with trio.move_on_after(0.05) as scope:
            await asked(store.peer, InvalidateBegin(FileId(1), RANGE))
        assert scope.cancelled_caught


async def test_answer_that_came_in_time_counts_although_it_is_read_late() -> None:
    """Who was stopped, or had to wait for a CPU, finds a deadline passed: that is not the other's fault."""

    def late(protocol: Connection, number: int) -> list[bytes]:
        time.sleep(0.1)
        return [protocol.send(Ack(), answers=number)[1]]  # type: ignore[arg-type]

    async def stand_still() -> None:
        time.sleep(0.3)  # noqa: ASYNC251 - all of us, as if stopped

    async with store_of(late) as store:
        with trio.move_on_after(0.05) as scope:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(stand_still)
                assert (await store.peer.call(InvalidateBegin(FileId(1), RANGE))).message == Ack()
        assert scope.cancel_called


# -- handlers ----------------------------------------------------------------------------------------------------------


async def test_handler_that_waits_holds_up_no_other_and_ends_with_the_connection() -> None:
    ended: list[int] = []

    async def wait_for_ever(request: Incoming) -> None:
        assert isinstance(request.message, Unregister)
        if request.message.file == FileId(1):
            await store.peer.reply(request.id, Done())
            return
        try:
            await trio.sleep_forever()
        finally:
            with trio.CancelScope(shield=True):
                await trio.sleep(0.01)
            ended.append(request.message.file)

    async with two_ends() as (owner, store):
        store.handle = wait_for_ever
        for number in (2, 3):
            owner.peer.post(Unregister(FileId(number)))
        with trio.fail_after(5):
            assert (await owner.peer.call(Unregister(FileId(1)))).message == Done()
        assert ended == []
        owner.peer.close()
        await store.ended.wait()
        assert sorted(ended) == [2, 3], "whoever serves waits for them"


async def test_handlers_end_when_serving_is_cancelled() -> None:
    ended = []

    async def wait_for_ever(request: Incoming) -> None:
        try:
            await trio.sleep_forever()
        finally:
            ended.append(request.id)

    async with raw_end() as (ours, other), two_ends() as (owner, store):
        await ours.send(HELLO)
        await other.request()
        store.handle = wait_for_ever
        owner.peer.post(Unregister(FileId(1)))
        await wait_all_tasks_blocked()
        store.scope.cancel()
        await store.ended.wait()
        assert len(ended) == 1
        await other.peer.reply(other.requests[0].id, HelloReply(2, 4096))  # another connection is unharmed
        await ours.send(datagram(Unregister.TYPE, struct.pack("<Q", 1), number=2))
        assert (await other.request(1)).message == Unregister(FileId(1))


@pytest.mark.parametrize("waits", [False, True])
async def test_handler_that_breaks_ends_the_connection(waits: bool) -> None:
    async def break_down(_: Incoming) -> None:
        if waits:
            await trio.lowlevel.checkpoint()
        raise ZeroDivisionError

    async with two_ends() as (owner, store):
        store.handle = break_down
        with pytest.raises(PeerGone):
            await owner.peer.call(Unregister(FileId(1)))
        await store.ended.wait()
        assert isinstance(store.error, ZeroDivisionError)


# -- what is not sent yet ----------------------------------------------------------------------------------------------


async def test_call_that_is_cancelled_before_its_turn_is_never_sent() -> None:
    async with two_ends() as (owner, store), trio.open_nursery() as nursery:
        for number in range(MAX_IN_FLIGHT):
            nursery.start_soon(store.peer.call, InvalidateBegin(FileId(number), RANGE))
        await wait_all_tasks_blocked()
        with trio.move_on_after(0.01):
            await store.peer.call(InvalidateBegin(FileId(1000), RANGE))
        await owner.peer.reply(owner.requests[0].id, Ack())
        nursery.start_soon(store.peer.call, InvalidateBegin(FileId(2000), RANGE))
        await wait_all_tasks_blocked()
        files = [request.message.file for request in owner.requests if isinstance(request.message, InvalidateBegin)]
        assert (1000 in files, files[-1]) == (False, 2000)
        nursery.cancel_scope.cancel()


async def test_answer_to_what_has_not_been_sent_breaks_the_protocol() -> None:
    """Or whoever guesses the numbers could have us keep what it never reads."""
    async with raw_end(room=1) as (ours, store):
        await ours.send(HELLO)
        await store.peer.reply((await store.request()).id, HelloReply(2, 4096))
        await ours.recv(64)
        calls = [store.peer.post(Fallocate(FileId(1), RANGE)) for _ in range(50)]
        assert not calls[-1].is_sent
        await ours.send(datagram(Ack.TYPE, struct.pack("<I", 0), number=50))
        await store.ended.wait()
        assert isinstance(store.error, RemoteProtocolError)
        with pytest.raises(PeerGone):
            await calls[-1].wait()
