"""Requests that come again: what was done is answered, what was not is done, and what kills every daemon is refused."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import trio
from trio.testing import wait_all_tasks_blocked

from memfs.fuse.abi import IN_HEADER, RESENT, Request, reply
from memfs.fuse.resent import Resent
from memfs.state.journal import LogJournal
from tests.helpers import raises


@pytest.fixture
def root(tmp_path: Path) -> Iterator[int]:
    fd = os.open(tmp_path, os.O_PATH)
    yield fd
    os.close(fd)


def request(number: int) -> Request:
    message = IN_HEADER.pack(IN_HEADER.size, 9, number | RESENT, 1, 0, 0, 0, 0, 0)
    return Request.parse(memoryview(message))


class Daemon:
    """One after the other, with the same log."""

    def __init__(self, root: int) -> None:
        self.journal = LogJournal(root)
        self.answers: list[bytes] = []
        self.resent = Resent(self.journal.load(), self.journal, self.answers.append)

    async def handle(self, number: int) -> bytes | None:
        return await self.resent.handle(request(number), self._done)

    async def _done(self, request: Request) -> bytes:
        return b"done"


class Killed(BaseException):
    """What SIGKILL is to the code below."""


async def test_what_was_committed_is_answered_and_not_done_again(root: int) -> None:
    first = LogJournal(root)
    first.keeps(b"x", lambda key: b"")
    first.changed(b"x")
    first.commit(42, reply(42, b"made"))
    daemon = Daemon(root)
    assert await daemon.handle(42) is None
    assert daemon.answers == [reply(42 | RESENT, b"made")]
    assert await daemon.handle(44) == b"done"
    assert len(daemon.answers) == 1


@pytest.mark.parametrize("waits", [0, 1, 2])
async def test_a_request_that_kills_each_daemon_is_refused(
    root: int, caplog: pytest.LogCaptureFixture, waits: int
) -> None:
    """In whichever of its steps it does."""

    async def kills(request: Request) -> bytes:
        for _ in range(waits):
            await trio.lowlevel.checkpoint()
        raise Killed

    for _ in range(2):
        with pytest.raises(Killed):
            await Daemon(root).resent.handle(request(42), kills)
    daemon = Daemon(root)
    with raises(errno.EIO):
        await daemon.handle(42)
    assert "killed memfs 2 times" in caplog.text
    assert await daemon.handle(44) == b"done"


async def test_a_handler_is_resumed_with_what_it_has_waited_for_and_may_handle_exceptions(root: int) -> None:
    async def handles(request: Request) -> bytes:
        with trio.CancelScope() as scope:
            scope.cancel()
            await trio.sleep_forever()
        assert scope.cancelled_caught
        return await trio.to_thread.run_sync(lambda: b"from a thread")

    daemon = Daemon(root)
    assert await daemon.resent.handle(request(42), handles) == b"from a thread"
    with raises(errno.ENOENT):
        await daemon.resent.handle(request(44), lambda request: fails())


async def fails() -> bytes:
    await trio.lowlevel.checkpoint()
    raise OSError(errno.ENOENT, "gone")


async def test_one_that_waits_is_not_guilty_of_what_happens_meanwhile(root: int, nursery: trio.Nursery) -> None:
    async def waits(request: Request) -> bytes:
        await trio.lowlevel.checkpoint()
        await trio.sleep_forever()
        return b""

    for _ in range(4):  # none of them comes any further
        nursery.start_soon(Daemon(root).resent.handle, request(42), waits)
        await wait_all_tasks_blocked()
    assert await Daemon(root).handle(42) == b"done"
    nursery.cancel_scope.cancel()
