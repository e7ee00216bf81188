"""One task that reads for all."""

from __future__ import annotations

import functools
import socket
import threading
from collections.abc import Iterator

import pytest
import trio
from trio.testing import wait_all_tasks_blocked

from memfs.contract.aio.busy_poll import BusyPoll
from memfs.contract.aio.eager import LoopTask
from memfs.contract.aio.poller import Poller
from memfs.contract.aio.turns import SHARE, Turns


@pytest.fixture
def pairs() -> Iterator[list[tuple[socket.socket, socket.socket]]]:
    pairs = [socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET) for _ in range(3)]
    yield pairs
    for pair in pairs:
        for end in pair:
            end.close()


Pairs = list[tuple[socket.socket, socket.socket]]


async def test_whoever_reads_is_called_for_as_long_as_there_is_something(pairs: Pairs) -> None:
    poller = Poller()
    read: list[tuple[int, bytes]] = []

    async def reader(number: int, _: LoopTask) -> bool:
        read.append((number, pairs[number][0].recv(64)))
        return False

    for number, (ours, _) in enumerate(pairs):
        poller.read(ours.fileno(), functools.partial(reader, number))
    for text in (b"a", b"b"):
        pairs[2][1].send(text)
        pairs[0][1].send(text)
    await wait_all_tasks_blocked()
    assert sorted(read) == [(0, b"a"), (0, b"b"), (2, b"a"), (2, b"b")]
    assert [text for number, text in read if number == 0] == [b"a", b"b"]
    poller.remove(pairs[0][0].fileno())
    pairs[0][1].send(b"c")
    await wait_all_tasks_blocked()
    assert len(read) == 4, "nobody reads that one for now"
    poller.read(pairs[0][0].fileno(), functools.partial(reader, 0))
    await wait_all_tasks_blocked()
    assert read[4:] == [(0, b"c")]
    for ours, _ in pairs:
        poller.remove(ours.fileno())
    pairs[1][1].send(b"d")
    await wait_all_tasks_blocked()
    assert len(read) == 5


async def test_reader_may_have_another_one_removed(pairs: Pairs) -> None:
    poller = Poller()
    called: list[int] = []

    async def reader(number: int, _: LoopTask) -> bool:
        called.append(number)
        for end, _theirs in pairs:
            poller.remove(end.fileno())
        return True

    for number, (ours, theirs) in enumerate(pairs):
        theirs.send(b"x")
        poller.read(ours.fileno(), functools.partial(reader, number))
    await wait_all_tasks_blocked()
    assert len(called) == 1


@pytest.mark.parametrize("wakes", [True, False])
async def test_tasks_get_a_turn_while_messages_keep_coming(pairs: Pairs, wakes: bool) -> None:
    """At once if there is something for one to do, and in any case after a while."""
    poller, (ours, theirs) = Poller(), pairs[0]
    woken = trio.Event()
    calls = 0

    async def reader(_: LoopTask) -> bool:
        nonlocal calls
        calls += 1
        woken.set()
        return wakes

    theirs.send(b"never read")
    async with trio.open_nursery() as nursery:
        nursery.start_soon(woken.wait)
        poller.read(ours.fileno(), reader)
    poller.remove(ours.fileno())
    assert calls <= (3 if wakes else 100)


async def test_a_user_with_many_descriptors_has_no_more_turns_than_one_with_one(pairs: Pairs) -> None:
    """Whose turn was the longest ago comes first, also if one message is as much work as a share."""
    poller, called = Poller(), list[str]()

    async def reader(user: str, _: LoopTask) -> bool:
        called.append(user)
        Turns.here().spend(user, SHARE)
        return False

    others = [socket.socketpair() for _ in range(100)]
    for number, (ours, theirs) in enumerate((*others, pairs[0])):
        theirs.send(b"never read")
        user = "many" if number < len(others) else "one"
        poller.read(ours.fileno(), functools.partial(reader, user), user)
    while called.count("one") < 10:
        await trio.lowlevel.checkpoint()
    assert called.count("many") <= 12
    for ours, _ in (*others, pairs[0]):
        poller.remove(ours.fileno())
    for ours, theirs in others:
        ours.close()
        theirs.close()
    assert not poller._users


async def test_other_tasks_run_when_a_share_of_work_is_done(pairs: Pairs) -> None:
    """What counts is work, not how many messages it took."""
    poller, (ours, theirs) = Poller(), pairs[0]
    woken, calls = trio.Event(), 0

    async def reader(_: LoopTask) -> bool:
        nonlocal calls
        calls += 1
        woken.set()
        Turns.here().spend(None, SHARE)
        return False

    theirs.send(b"never read")
    async with trio.open_nursery() as nursery:
        nursery.start_soon(woken.wait)
        poller.read(ours.fileno(), reader)
    poller.remove(ours.fileno())
    assert calls <= 3


class Sleeps(trio.abc.Instrument):
    """How often the event loop has slept."""

    count = 0

    def before_io_wait(self, timeout: float) -> None:
        self.count += timeout > 0


async def test_who_stays_does_not_sleep_and_holds_up_nobody(pairs: Pairs) -> None:
    poller, (ours, theirs) = Poller(BusyPoll(10, window=10)), pairs[0]
    sleeps, woken, done = Sleeps(), trio.Event(), trio.Event()
    slept: list[int] = []

    async def reader(_: LoopTask) -> bool:
        slept.append(sleeps.count)
        text = ours.recv(64)
        if text == b"first":
            poller.expect()
        (woken if text == b"first" else done).set()
        return False

    poller.read(ours.fileno(), reader)
    await wait_all_tasks_blocked()
    trio.lowlevel.add_instrument(sleeps)
    theirs.send(b"first")
    await woken.wait()
    threading.Timer(0.05, theirs.send, [b"second"]).start()
    await done.wait()
    trio.lowlevel.remove_instrument(sleeps)
    assert slept[1] == slept[0]
    poller.remove(ours.fileno())


def test_each_event_loop_has_its_own() -> None:
    async def here() -> tuple[Poller, Poller]:
        return Poller.here(), Poller.here()

    first, again = trio.run(here)
    other, _ = trio.run(here)
    assert first is again
    assert first is not other
