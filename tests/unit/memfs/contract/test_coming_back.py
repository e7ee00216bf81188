"""A client whose memfs was killed: what it says to the next one, and what it makes of the time in between."""

from __future__ import annotations

import errno
import os
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from pathlib import Path

import pytest
import trio
import trio.lowlevel
from trio.testing import wait_all_tasks_blocked

from memfs.contract.page_ranges import NO_PAGES, PageRanges
from memfs.contract.protocol.call import Incoming, PeerGone
from memfs.contract.protocol.client import Client, StoreGone, connect
from memfs.contract.protocol.connection import REPEATED, Connection, LocalProtocolError, RemoteProtocolError, Role
from memfs.contract.protocol.messages import (
    NO_TOKEN,
    VERSION,
    ConvertBegin,
    ConvertEnd,
    Done,
    Failed,
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
    PutPfn,
    Register,
    Registered,
    Token,
    Unregister,
)
from memfs.contract.protocol.peer import Peer, close_all
from memfs.contract.sys.peer_credentials import PeerCredentials
from memfs.contract.units import PAGE_SIZE, Pfn
from tests.helpers import one, pages

FILE, OTHER = FileId(1), FileId(2)
TOKEN = Token(bytes(range(16)))
PFNS = PfnReply(FILE, one(0), (PfnRun(one(0), Pfn(512)),))


class Stores:
    """One memfs after the other on one socket; each answers what the test says, and notes what it was asked."""

    def __init__(self, listener: socket.socket) -> None:
        self.listener = listener
        self.asked: list[tuple[int, Message]] = []  # of the one that there is now
        self.answers: dict[type[Message], Message] = {
            Hello: HelloReply(VERSION, PAGE_SIZE, TOKEN),
            Launch: Measured(bytes(48)),
        }
        self.peer: Peer
        self._ended = trio.Event()

    async def run(self) -> None:
        """Be one until it is killed, and then the next."""
        while True:
            await trio.lowlevel.wait_readable(self.listener)
            self.peer, self._ended = Peer(self.listener.accept()[0], Role.STORE), trio.Event()
            with suppress(PeerGone):
                await self.peer.serve(self._answer)
            self._ended.set()

    async def _answer(self, request: Incoming) -> None:
        self.asked.append((request.id, request.message))
        answer = self.answers.get(type(request.message))
        if answer is not None:
            fds = request.fds[:1] if isinstance(answer, Registered) else ()
            with suppress(PeerGone):
                await self.peer.reply(request.id, answer, fds)
        close_all(request.fds)

    async def die(self) -> None:
        """Be killed."""
        await wait_all_tasks_blocked()
        self.peer.close()
        await self._ended.wait()
        self.asked = []

    async def heard(self, number: int) -> list[tuple[int, Message]]:
        """What the one that there is now was asked, when that is so much."""
        with trio.fail_after(10):
            while len(self.asked) < number:  # noqa: ASYNC110 - polled, for a new one begins anew
                await trio.sleep(0.001)
        return self.asked


@asynccontextmanager
async def both(path: Path) -> AsyncIterator[tuple[Client, Stores, list[Notification | str]]]:
    """A client, its stores, and what it heard."""
    heard: list[Notification | str] = []

    async def hear(message: Notification) -> None:
        heard.append(message)

    async def resumed() -> None:
        heard.append("resumed")

    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as listener:
        listener.bind(f"{path}/socket")
        listener.listen(1)
        stores = Stores(listener)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(stores.run)
            async with connect(f"{path}/socket", "vm", hear, resumed) as client:
                yield client, stores, heard
            nursery.cancel_scope.cancel()


async def test_what_was_not_answered_is_repeated_and_what_is_new_has_new_numbers(tmp_path: Path) -> None:
    async with both(tmp_path) as (client, stores, _), trio.open_nursery() as nursery:
        answers: list[Message] = []

        async def ask(message: Launch | GetPfn | PutPfn | Unregister) -> None:
            answers.append((await client.request(message)).message)

        await client.launch(FILE)
        waiting = GetPfn(FILE, one(0), alloc=True), PutPfn(FILE, one(0), dirty=False)
        for message in waiting:
            nursery.start_soon(ask, message)
            await wait_all_tasks_blocked()
        assert stores.asked == [(1, Hello(name="vm")), (2, Launch(FILE)), *zip((3, 4), waiting, strict=True)]
        await stores.die()
        nursery.start_soon(ask, Unregister(FILE))  # perhaps while nobody is there
        again = await stores.heard(4)
        assert again[0] == (1, Hello(name="vm", token=TOKEN))
        assert again[1:3] == [(REPEATED | 3, waiting[0]), (REPEATED | 4, waiting[1])]
        assert again[3] == (5, Unregister(FILE))
        await stores.die()
        again = await stores.heard(4)
        numbers = [number for number, _ in again]
        assert numbers == [1, REPEATED | 3, REPEATED | 4, REPEATED | 5]
        for (number, _), answer in zip(again[1:], (PFNS, Done(), Failed(errno.EBADF, "no")), strict=True):
            await stores.peer.reply(number, answer)  # type: ignore[arg-type]
        while len(answers) < 3:
            await trio.lowlevel.checkpoint()
        assert answers == [PFNS, Done(), Failed(errno.EBADF, "no")]
        assert (client.resumed, client.gone) == (2, None)


async def test_what_had_begun_is_over_before_anything_begins_anew(tmp_path: Path) -> None:
    ranges = PageRanges.of([pages(0, 2)])
    async with both(tmp_path) as (client, stores, heard):
        begun = InvalidateBegin(FILE, pages(3, 5)), ConvertBegin(OTHER, FILE, True, ranges)
        for message in (InvalidateBegin(FILE, one(9)), *begun):
            await stores.peer.call(message)
        await stores.peer.tell(InvalidateEnd(FILE, one(9)))
        await stores.die()
        await client.launch(FILE)
        await stores.peer.call(begun[0])
        ends = InvalidateEnd(FILE, pages(3, 5)), ConvertEnd(OTHER, FILE, True, NO_PAGES)
        assert heard[4:] == [*ends, "resumed", begun[0]]


async def test_killed_again_and_again(tmp_path: Path) -> None:
    async with both(tmp_path) as (client, stores, heard):
        del stores.answers[Hello]
        await stores.die()
        for _ in range(2):
            assert await stores.heard(1) == [(1, Hello(name="vm", token=TOKEN))]
            await stores.die()
        stores.answers[Hello] = HelloReply(VERSION, PAGE_SIZE, TOKEN)
        await client.launch(FILE)
        assert (client.resumed, heard) == (1, ["resumed"])


async def test_registering_that_nobody_waits_for_is_undone_by_the_next(tmp_path: Path) -> None:
    """Its descriptor may be closed by then; it does not matter for what was done."""
    async with both(tmp_path) as (client, stores, _):
        fd = os.open(tmp_path, os.O_RDONLY)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(client.register, fd)
            await wait_all_tasks_blocked()
            nursery.cancel_scope.cancel()
        os.close(fd)
        stores.answers[Register] = Registered(FILE, 3, PAGE_SIZE, 0)
        stores.answers[Unregister] = Done()
        await stores.die()
        assert [message for _, message in await stores.heard(3)][1:] == [Register(), Unregister(FILE)]


@pytest.mark.parametrize("token", [NO_TOKEN, TOKEN])
async def test_one_that_nobody_knows_any_more_has_lost_its_memory(tmp_path: Path, token: Token) -> None:
    async with both(tmp_path) as (client, stores, heard):
        if token == NO_TOKEN:  # of the next one
            stores.answers[Hello] = HelloReply(VERSION, PAGE_SIZE)
            await stores.die()
            await client.launch(FILE)
        else:
            stores.answers[Hello] = Failed(errno.ESTALE, "no such owner")
        async with trio.open_nursery() as nursery:

            async def ask() -> None:
                with pytest.raises(StoreGone, match="closed the connection" if token == NO_TOKEN else "no such owner"):
                    await client.unregister(FILE)

            nursery.start_soon(ask)
            await stores.die()
        assert client.gone is not None
        assert heard.count("resumed") == (token == NO_TOKEN)


async def test_nobody_else_is_told_the_token(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async with both(tmp_path) as (client, stores, _):
        monkeypatch.setattr(PeerCredentials, "of", lambda sock: PeerCredentials(1, 12001, 12001))
        await stores.die()
        await client.ended.wait()
        assert client.gone is not None
        assert "user 12001 listens on its socket" in client.gone
        assert stores.asked == []


def test_a_token_is_not_shown() -> None:
    for message in (Hello(token=TOKEN), HelloReply(VERSION, PAGE_SIZE, TOKEN)):
        assert "token" not in repr(message)
        assert repr(TOKEN) not in repr(message)


@pytest.mark.parametrize("token", [NO_TOKEN, TOKEN])
def test_only_who_has_come_back_repeats_anything(token: Token) -> None:
    owner, store = Connection(Role.OWNER), Connection(Role.STORE)
    number, data = owner.send(Hello(token=token))
    store.receive(data)
    owner.receive(store.send(HelloReply(VERSION, PAGE_SIZE, TOKEN), answers=number)[1])
    other = Connection(Role.OWNER)
    number, data = other.send(Hello(token=TOKEN))
    other.receive(Connection.send(_greeted(data), HelloReply(VERSION, PAGE_SIZE, TOKEN), answers=number)[1])
    _, repeated = other.send(Launch(FILE), repeats=number + 6)  # type: ignore[arg-type]
    if token == NO_TOKEN:
        with pytest.raises(LocalProtocolError, match="repeated"):
            owner.send(Launch(FILE), repeats=number + 6)  # type: ignore[arg-type]
        with pytest.raises(RemoteProtocolError, match="repeated"):
            store.receive(repeated)
        return
    received = store.receive(repeated)
    assert received.id == REPEATED | 7
    assert store.send(Measured(bytes(48)), answers=received.id)[0] == received.id
    for again in (repeated, other.send(Launch(FILE))[1]):
        if again is repeated:
            with pytest.raises(RemoteProtocolError, match="number 7 after 7"):
                store.receive(again)
        else:
            assert store.receive(again).id == 8


def _greeted(hello: bytes) -> Connection:
    store = Connection(Role.STORE)
    store.receive(hello)
    return store
