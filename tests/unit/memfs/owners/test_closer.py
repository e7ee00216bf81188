"""Descriptors of strangers are never this process's, and what is done with them holds up their sender only."""

from __future__ import annotations

import array
import errno
import os
import signal
import socket
import struct
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest
import trio
from trio.testing import wait_all_tasks_blocked

from memfs.owners.closer import Closer, NoCloser
from tests.helpers import raises

ALICE, BOB = 12001, 12002
RECEIVE = (100, int(socket.MSG_CMSG_CLOEXEC))


@pytest.fixture
def closer() -> Iterator[Closer]:
    """A closer, and whoever it is forked by has no descriptor more in the end."""
    before = os.listdir("/proc/self/fd")
    closer = Closer.start()
    yield closer
    closer.stop()
    assert len(os.listdir("/proc/self/fd")) <= len(before)


@pytest.fixture
def running(closer: Closer, nursery: trio.Nursery) -> Closer:
    """A closer that is listened to."""
    nursery.start_soon(closer.run)
    return closer


@pytest.fixture
def connection() -> Iterator[tuple[socket.socket, socket.socket]]:
    """What a stranger and we have of a connection."""
    theirs, ours = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    ours.setblocking(False)
    with theirs, ours:
        yield theirs, ours


def received(closer: Closer, sock: socket.socket, user: int = ALICE) -> tuple[bytes, list[int], int]:
    """Receive a datagram: what it is, the descriptors in the closer, flags."""
    data, ancillary, flags, _ = closer.receive(user, sock, *RECEIVE)
    numbers = array.array("i")
    for _, _, packed in ancillary:
        numbers.frombytes(packed)
    return data, list(numbers), flags & int(socket.MSG_CTRUNC)


def held() -> int:
    """How many descriptors this process has."""
    return len(os.listdir("/proc/self/fd"))


async def hung_up(end: socket.socket) -> None:
    """Wait until nobody has the other end of a pipe or socket."""
    with trio.fail_after(10):
        await trio.lowlevel.wait_readable(end)
        assert end.recv(1) == b""


def lingering(count: int) -> Iterator[tuple[int, socket.socket]]:
    """Generate descriptors whose close(2) takes as long as the other end is there, a minute at most."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        for _ in range(count):
            lingers = socket.create_connection(listener.getsockname())
            lingers.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 60))
            lingers.setblocking(False)
            with suppress(BlockingIOError):
                while True:
                    lingers.send(bytes(1 << 16))
            yield lingers.detach(), listener.accept()[0]


def test_datagram_without_descriptors_is_as_it_was(
    closer: Closer, connection: tuple[socket.socket, socket.socket]
) -> None:
    theirs, ours = connection
    for data in (b"first", b"second" * 30):
        theirs.send(data)
    assert received(closer, ours) == (b"first", [], 0)
    data, ancillary, flags, _ = closer.receive(ALICE, ours, *RECEIVE)
    assert (data, ancillary, flags & socket.MSG_TRUNC) == ((b"second" * 30)[:100], [], socket.MSG_TRUNC)
    with pytest.raises(BlockingIOError):
        closer.receive(ALICE, ours, *RECEIVE)
    theirs.close()
    assert received(closer, ours) == (b"", [], 0)


async def test_descriptors_that_come_are_never_ours(
    running: Closer, connection: tuple[socket.socket, socket.socket]
) -> None:
    theirs, ours = connection
    before = held()
    one, other = socket.socketpair()
    socket.send_fds(theirs, [b"look"], [other.fileno(), other.fileno()])
    theirs.send(b"next")
    other.close()
    data, fds, cut = received(running, ours)
    assert (data, len(fds), cut) == (b"look", 2, 0)
    assert held() == before + 1  # our end of what was sent
    info = await running.look(ALICE, fds[0])
    assert int(info["flags"], 8) & os.O_ACCMODE == os.O_RDWR
    assert received(running, ours) == (b"next", [], 0)
    one.setblocking(False)
    await running.close(ALICE, fds[0])
    with pytest.raises(BlockingIOError):
        one.recv(1)
    await running.close(ALICE, fds[1])
    await hung_up(one)
    with raises(errno.ENOENT):
        await running.look(ALICE, fds[1])
    one.close()


def test_memory_is_fetched_and_nothing_else(
    closer: Closer, connection: tuple[socket.socket, socket.socket], tmp_path: Path
) -> None:
    theirs, ours = connection
    memory = os.memfd_create("content", os.MFD_ALLOW_SEALING)
    os.write(memory, b"content")
    with (tmp_path / "file").open("w") as file:
        socket.send_fds(theirs, [b"x"], [memory, file.fileno()])
    os.close(memory)
    _, fds, _ = received(closer, ours)
    fetched = closer.fetch(fds[0])
    assert os.pread(fetched, 100, 0) == b"content"
    assert not os.get_inheritable(fetched)
    os.close(fetched)
    with raises(errno.EINVAL):
        closer.fetch(fds[1])


async def test_user_s_descriptors_hold_up_that_user_only(
    running: Closer, connection: tuple[socket.socket, socket.socket]
) -> None:
    """A socket that lingers, as a filesystem that does not answer, has who closes it wait."""
    theirs, ours = connection
    pairs, fds = list(lingering(4)), []
    for fd, _ in pairs:
        socket.send_fds(theirs, [b"x"], [fd])
        os.close(fd)
        fds += received(running, ours)[1]
    one, other = socket.socketpair()
    quick = []
    for user in (ALICE, BOB):
        socket.send_fds(theirs, [b"x"], [other.fileno()])
        quick += received(running, ours, user)[1]
    other.close()
    async with trio.open_nursery() as nursery:
        for fd in fds:
            nursery.start_soon(running.close, ALICE, fd)
        await wait_all_tasks_blocked()
        with trio.move_on_after(0.1) as scope:
            await running.close(ALICE, quick[0])
        assert scope.cancelled_caught
        with trio.fail_after(10):
            await running.close(BOB, quick[1])
            assert "flags" in await running.look(BOB, 0)
        assert len(nursery.child_tasks) == 4
        for _, peer in pairs:
            peer.close()
    await hung_up(one)  # cancelled, it is closed all the same
    one.close()


async def test_more_descriptors_than_are_wanted_hold_up_nobody_either(
    running: Closer, connection: tuple[socket.socket, socket.socket]
) -> None:
    """The kernel would close those for which there is no space in recvmsg(2), and wait there."""
    theirs, ours = connection
    pairs = list(lingering(6))
    socket.send_fds(theirs, [b"x"], [fd for fd, _ in pairs])
    for fd, _ in pairs:
        os.close(fd)
    data, fds, cut = received(running, ours)
    assert (data, len(fds), cut) == (b"x", 6, 0)
    one, other = socket.socketpair()
    socket.send_fds(theirs, [b"y"], [other.fileno()])
    other.close()
    assert len(received(running, ours)[1]) == 1  # or it could not answer
    for _, peer in pairs:
        peer.close()
    for fd in fds:
        await running.close(ALICE, fd)
    one.close()


async def test_user_has_a_share_of_its_descriptors(
    running: Closer, connection: tuple[socket.socket, socket.socket]
) -> None:
    theirs, ours = connection
    held = running.held
    held.take(ALICE, held.left // 2)
    socket.send_fds(theirs, [b"x"], [ours.fileno()])
    with raises(errno.EMFILE, match=f"user {ALICE} has "):
        running.receive(ALICE, ours, *RECEIVE)
    _, [(_, _, packed)], _, _ = running.receive(BOB, ours, *RECEIVE)
    (number,) = array.array("i", packed)
    assert held.of(BOB) == 1
    await running.close(BOB, number)
    assert held.of(BOB) == 0


async def test_another_takes_its_place(
    running: Closer, connection: tuple[socket.socket, socket.socket], caplog: pytest.LogCaptureFixture
) -> None:
    theirs, ours = connection
    one, other = socket.socketpair()
    socket.send_fds(theirs, [b"x"], [other.fileno()])
    _, fds, _ = received(running, ours)
    killed = running.pid
    os.kill(killed, signal.SIGKILL)
    with trio.fail_after(10):
        while running.pid == killed:  # noqa: ASYNC110
            await trio.sleep(0.01)
    assert [record.message for record in caplog.records] == [
        "the closer is gone: until there is another one, no client can send a descriptor",
        "there is another closer",
    ]
    socket.send_fds(theirs, [b"y"], [other.fileno()])
    other.close()
    _, again, _ = received(running, ours)
    await running.close(ALICE, fds[0])  # as it is: nothing of the other's is closed
    with pytest.raises(NoCloser):
        await running.look(ALICE, fds[0])
    assert "flags" in await running.look(ALICE, again[0])
    await running.close(ALICE, again[0])
    await hung_up(one)
    one.close()


async def test_without_it_descriptors_are_refused_and_messages_are_not(
    connection: tuple[socket.socket, socket.socket],
) -> None:
    theirs, ours = connection
    closer = Closer.start()
    one, other = socket.socketpair()
    socket.send_fds(theirs, [b"x"], [other.fileno()])
    _, fds, _ = received(closer, ours)
    async with trio.open_nursery() as nursery:

        async def wait() -> None:
            with suppress(NoCloser):
                while True:
                    await closer.look(ALICE, fds[0])

        nursery.start_soon(closer._line.hear)
        nursery.start_soon(wait)
        os.kill(closer.pid, signal.SIGKILL)
    await closer.close(ALICE, fds[0])  # as it is
    socket.send_fds(theirs, [b"Register"], [other.fileno()])
    other.close()
    assert received(closer, ours) == (b"Register", [], socket.MSG_CTRUNC)
    await hung_up(one)
    one.close()
    with pytest.raises(NoCloser):
        closer.fetch(0)
    closer.stop()
