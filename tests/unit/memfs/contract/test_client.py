"""The public client, with a store at the other end that does what the test says."""

from __future__ import annotations

import errno
import os
import socket
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, suppress
from pathlib import Path

import pytest
import trio
from trio.testing import wait_all_tasks_blocked

from memfs.contract.protocol.call import Incoming, PeerGone
from memfs.contract.protocol.client import Client, OnNotification, StoreGone, connect
from memfs.contract.protocol.connection import Role
from memfs.contract.protocol.messages import (
    VERSION,
    Ack,
    Done,
    Failed,
    Fallocate,
    Fenced,
    FileId,
    GetPfn,
    Hello,
    HelloReply,
    InvalidateBegin,
    InvalidateEnd,
    Launch,
    Measured,
    Message,
    Notification,
    PfnReply,
    PfnRun,
    Populate,
    PutPfn,
    Register,
    Registered,
    Unregister,
)
from memfs.contract.protocol.peer import Peer, close_all
from memfs.contract.units import PAGE_SIZE, ByteOffset, PageIndex, PageRange, Pfn
from tests.helpers import raises

FILE = FileId(1)
PAGES = PageRange(PageIndex(0), PageIndex(2))
PFNS = PfnReply(FILE, PAGES, (PfnRun(PAGES, Pfn(512)),))
ANSWERS: dict[type[Message], Message] = {
    Hello: HelloReply(VERSION, PAGE_SIZE),
    Register: Registered(FILE, 3, 2 * PAGE_SIZE, 0),
    Unregister: Done(),
    GetPfn: PFNS,
    PutPfn: Done(),
    Populate: Measured(b"m" * 48),
    Launch: Measured(b"l" * 48),
}


class Store:
    """The other end."""

    peer: Peer

    def __init__(self) -> None:
        self.requests: list[Message] = []
        self.answers = dict(ANSWERS)
        self.handle: Callable[[Incoming], Awaitable[None]] = self.answer

    async def serve(self) -> None:
        async def handle(request: Incoming) -> None:
            await self.handle(request)

        await self.peer.serve(handle)

    async def answer(self, request: Incoming) -> None:
        self.requests.append(request.message)
        fds = request.fds[:1] if isinstance(request.message, Register) else ()
        with suppress(PeerGone):
            await self.peer.reply(request.id, self.answers[type(request.message)], fds)
        close_all(request.fds)


@asynccontextmanager
async def store_at(path: Path) -> AsyncIterator[Store]:
    """A store that listens on a socket, for one client."""
    store = Store()
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as listener:
        listener.bind(str(path))
        listener.listen(1)

        async def serve() -> None:
            await trio.lowlevel.wait_readable(listener)
            store.peer = Peer(listener.accept()[0], Role.STORE)
            await store.serve()

        async with trio.open_nursery() as nursery:
            nursery.start_soon(serve)
            yield store
            nursery.cancel_scope.cancel()


async def ignore(_: Notification) -> None:
    pass


@asynccontextmanager
async def both(path: Path, on_notification: OnNotification = ignore) -> AsyncIterator[tuple[Client, Store]]:
    """A client and its store."""
    async with store_at(path / "socket") as store, connect(str(path / "socket"), "vm", on_notification) as client:
        yield client, store


async def test_requests_say_what_they_are_called(tmp_path: Path) -> None:
    end, other = os.pipe()
    async with both(tmp_path) as (client, store):
        registered, fds = await client.register(end)
        assert (registered.file, len(fds)) == (FILE, 1)
        assert os.fstat(fds[0]).st_ino == os.fstat(end).st_ino
        close_all(fds)
        assert await client.get_pfn(FILE, PAGES, alloc=True) == PFNS
        await client.put_pfn(FILE, PAGES, dirty=True)
        assert await client.populate(end, PAGES, other, ByteOffset(0)) == b"m" * 48
        assert await client.launch(FILE) == b"l" * 48
        await client.unregister(FILE)
        assert store.requests == [
            Hello(name="vm"),
            Register(),
            GetPfn(FILE, PAGES, alloc=True, lock=False),
            PutPfn(FILE, PAGES, dirty=True),
            Populate(PAGES, ByteOffset(0)),
            Launch(FILE),
            Unregister(FILE),
        ]
    close_all((end, other))


async def test_refusal_is_an_oserror_and_harms_nothing(tmp_path: Path) -> None:
    async with both(tmp_path) as (client, store):
        store.answers[GetPfn] = Failed(errno.ENOSPC, "no space")
        with raises(errno.ENOSPC):
            await client.get_pfn(FILE, PAGES, alloc=True)
        assert (await client.request(GetPfn(FILE, PAGES, alloc=True))).message == store.answers[GetPfn]
        assert await client.launch(FILE) == b"l" * 48


async def test_nobody_listens(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        async with connect(str(tmp_path / "nothing"), "vm", ignore):
            raise AssertionError


@pytest.mark.parametrize("answer", [Failed(errno.EPROTONOSUPPORT, "version 2 only"), HelloReply(2, 16384)])
async def test_store_that_does_not_suit_is_left(tmp_path: Path, answer: Message) -> None:
    async with store_at(tmp_path / "socket") as store:
        store.answers[Hello] = answer
        with raises(errno.EPROTONOSUPPORT):
            async with connect(str(tmp_path / "socket"), "vm", ignore):
                raise AssertionError


async def test_notification_is_acknowledged_when_it_has_been_acted_upon(tmp_path: Path) -> None:
    heard: list[Notification] = []
    may_go_on = trio.Event()

    async def hear(message: Notification) -> None:
        heard.append(message)
        if isinstance(message, InvalidateBegin):
            await may_go_on.wait()

    async with both(tmp_path, hear) as (client, store):
        begin, allocated = InvalidateBegin(FILE, PAGES), Fallocate(FILE, PAGES)
        call = store.peer.post(begin)
        assert (await store.peer.call(allocated)).message == Ack(), "one that waits does not hold up the next"
        await wait_all_tasks_blocked()
        assert not call.is_done
        may_go_on.set()
        assert (await call.result()).message == Ack()
        await store.peer.tell(InvalidateEnd(FILE, PAGES))
        await client.launch(FILE)
        assert heard == [begin, allocated, InvalidateEnd(FILE, PAGES)]


async def test_who_cannot_act_leaves(tmp_path: Path) -> None:
    """memfs must not believe that anything was unmapped."""

    async def fail(_: Notification) -> None:
        raise OSError(errno.ENOMEM, "Cannot allocate memory")

    async with both(tmp_path, fail) as (client, store):
        with pytest.raises(PeerGone):
            await store.peer.call(InvalidateBegin(FILE, PAGES))
        await client.ended.wait()
        with pytest.raises(StoreGone, match=r"could not be acted upon: Cannot allocate memory"):
            await client.launch(FILE)


async def test_everything_ends_when_the_store_is_gone_and_says_why(tmp_path: Path) -> None:
    async with both(tmp_path) as (client, store):

        async def refuse(request: Incoming) -> None:
            await store.peer.tell(Fenced(errno.ETIMEDOUT, "no answer within 5 s"))
            store.peer.close()

        store.handle = refuse
        with pytest.raises(StoreGone, match="cut us off: no answer within 5 s"):
            await client.launch(FILE)
        assert client.fenced == Fenced(errno.ETIMEDOUT, "no answer within 5 s")
        with pytest.raises(StoreGone, match="cut us off"):
            await client.launch(FILE)


async def test_exception_of_the_block_leaves_as_it_is(tmp_path: Path) -> None:
    error = LookupError("the block's")
    async with store_at(tmp_path / "socket"):
        with pytest.raises(LookupError) as raised:
            async with connect(str(tmp_path / "socket"), "vm", ignore):
                raise error
        assert raised.value is error
