"""Looking for what can be read before sleeping."""

from __future__ import annotations

import socket
import time

import trio

from memfs.lookout import Lookout, has_threads_at_work


async def test_whatever_comes_ends_it() -> None:
    lookout = Lookout()
    pairs = [socket.socketpair() for _ in range(3)]
    for ours, _ in pairs:
        lookout.add(ours.fileno())
    assert not lookout.look(0.001)
    pairs[1][1].send(b"x")
    started = time.perf_counter()
    assert lookout.look(60)
    assert time.perf_counter() - started < 10
    lookout.remove(pairs[1][0].fileno())
    assert not lookout.look(0)
    for pair in pairs:
        for end in pair:
            end.close()


def test_what_was_closed_before_it_was_removed_is_gone_all_the_same() -> None:
    lookout = Lookout()
    ours, theirs = socket.socketpair()
    fd = ours.fileno()
    lookout.add(fd)
    theirs.send(b"x")
    ours.close()
    theirs.close()
    lookout.remove(fd)
    assert not lookout.look(0)


def test_each_event_loop_has_its_own() -> None:
    async def here() -> tuple[Lookout, Lookout]:
        return Lookout.here(), Lookout.here()

    first, again = trio.run(here)
    other, _ = trio.run(here)
    assert first is again
    assert first is not other


async def test_threads_at_work_are_seen() -> None:
    assert not has_threads_at_work()
    seen = await trio.to_thread.run_sync(lambda: trio.from_thread.run_sync(has_threads_at_work))
    assert seen
