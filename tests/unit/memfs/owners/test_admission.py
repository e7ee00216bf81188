"""Who may connect, how much a user may hold, and that nobody waits for what another user's descriptors do."""

from __future__ import annotations

import errno
import os
import socket
import struct
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack

import pytest
import trio
from trio.testing import MockClock, wait_all_tasks_blocked

from memfs.owners.admission import (
    MAX_CONNECTIONS,
    MAX_PER_USER,
    MAX_SILENT,
    Client,
    Clients,
    Credentials,
    Rejected,
)
from memfs.owners.closer import Closer
from tests.helpers import raises

ALICE, BOB, CAROL = 12001, 12002, 12003
GROUP = 12100


def someone(uid: int = ALICE, *groups: int) -> Credentials:
    """Somebody of these groups."""
    return Credentials(1, uid, frozenset(groups))


def admit(clients: Clients, uid: int, count: int = 1) -> list[Client]:
    """Let a user's connections in, all of which say Hello."""
    admitted = []
    for _ in range(count):
        admitted.append(clients.admit(someone(uid), lambda: None))
        admitted[-1].greeted()
    return admitted


def null() -> int:
    """A descriptor that is closed in no time."""
    return os.open("/dev/null", os.O_RDONLY)


def is_open(fd: int) -> bool:
    """Whether a descriptor is open."""
    try:
        os.fstat(fd)
    except OSError:
        return False
    return True


# -- credentials ------------------------------------------------------------------------------------------------------


async def test_of_this_process() -> None:
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with ours, theirs:
        assert Credentials.of(ours) == Credentials(
            os.getpid(), os.geteuid(), frozenset({os.getegid(), *os.getgroups()})
        )


CONNECT = """
import os, socket, sys
uid, gid, *groups = map(int, sys.argv[2:])
os.setgroups(groups)
os.setgid(gid)
os.setuid(uid)
with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as sock:
    sock.connect("\\0" + sys.argv[1])
    sock.recv(1)
"""


@pytest.mark.parametrize("groups", [[], [5, 7], list(range(20000, 20300))])
async def test_of_another_user(groups: list[int]) -> None:
    """What counts is who connected; of more groups than can be asked for, it is the first one."""
    if os.geteuid() != 0:
        pytest.skip("only root can start a process of another user")
    name = f"memfs-test-{os.getpid()}-{len(groups)}"
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as listener:
        listener.bind(f"\0{name}")
        listener.listen(1)
        command = [sys.executable, "-Ic", CONNECT, name, *map(str, (ALICE, GROUP, *groups))]
        process = await trio.lowlevel.open_process(command)
        with trio.fail_after(10):
            await trio.lowlevel.wait_readable(listener)
            sock, _ = listener.accept()
        with sock:
            seen = Credentials.of(sock)
        await process.wait()
    assert seen == Credentials(process.pid, ALICE, frozenset({GROUP} if len(groups) > 256 else {GROUP, *groups}))


def test_are_named_in_sentences() -> None:
    assert str(Credentials(7, ALICE, frozenset())) == f"process 7 of user {ALICE}"


# -- the socket's mode ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("mode", "group", "admitted"),
    [
        (0o600, GROUP, False),
        (0o600, 5, False),
        (0o640, GROUP, False),
        (0o660, GROUP, True),
        (0o660, 5, False),
        (0o606, GROUP, False),
        (0o606, 5, True),
        (0o666, GROUP, True),
        (0o666, 5, True),
    ],
)
def test_mode_says_who_may_connect(mode: int, group: int, admitted: bool) -> None:
    clients = Clients(mode, GROUP)
    if admitted:
        clients.admit(someone(ALICE, group), lambda: None)
    else:
        with pytest.raises(Rejected, match=f"user {ALICE} is rejected: socket_mode={mode:04o} does not admit it"):
            clients.admit(someone(ALICE, group), lambda: None)
    assert (clients.connections, len(clients.silent), clients.rejected) == (admitted, admitted, not admitted)


def test_without_a_group_it_is_the_daemon_s() -> None:
    clients = Clients(0o660, None)
    clients.admit(someone(ALICE, os.getegid()), lambda: None)
    with pytest.raises(Rejected):
        clients.admit(someone(ALICE, os.getegid() + 1), lambda: None)


def test_root_and_the_daemon_s_user_are_always_let_in(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.geteuid", lambda: BOB)
    clients = Clients(0o000, GROUP)
    for uid in (0, BOB):
        admit(clients, uid, MAX_PER_USER + 1)
    with pytest.raises(Rejected):
        clients.admit(someone(ALICE), lambda: None)
    assert (clients.connections, clients.rejected) == (2 * MAX_PER_USER + 2, 1)


# -- limits -----------------------------------------------------------------------------------------------------------


def test_user_has_so_many_connections_and_others_are_not_concerned() -> None:
    clients = Clients(0o666, GROUP)
    admitted = admit(clients, ALICE, MAX_PER_USER)
    with pytest.raises(Rejected, match=f"it has {MAX_PER_USER} connections"):
        clients.admit(someone(ALICE), lambda: None)
    assert (clients.connections, clients.rejected, len(clients.silent)) == (MAX_PER_USER, 1, 0)
    admit(clients, BOB)
    admitted[0].disconnected()
    admit(clients, ALICE)
    assert clients.connections == MAX_PER_USER + 1


def test_from_a_number_on_only_the_trusted_are_let_in() -> None:
    clients = Clients(0o666, GROUP)
    for uid in range(ALICE, ALICE + MAX_CONNECTIONS // MAX_PER_USER):
        admit(clients, uid, MAX_PER_USER)
    with pytest.raises(Rejected, match=f"there are {MAX_CONNECTIONS} connections"):
        clients.admit(someone(CAROL + 100), lambda: None)
    assert clients.connections == MAX_CONNECTIONS
    admit(clients, 0)
    assert clients.connections == MAX_CONNECTIONS + 1


def test_oldest_of_the_silent_is_hung_up() -> None:
    clients, hung_up = Clients(0o666, GROUP), list[int]()

    def connect(number: int) -> Client:
        return clients.admit(someone(), lambda: hung_up.append(number))

    first = [connect(number) for number in range(MAX_SILENT)]
    first[0].greeted()
    first[1].disconnected()
    assert len(clients.silent) == MAX_SILENT - 2
    connect(1000)
    connect(1001)
    assert (hung_up, clients.rejected) == ([], 0)
    connect(1002)
    assert (hung_up, clients.rejected, len(clients.silent)) == ([2], 1, MAX_SILENT)
    connect(1003)
    assert (hung_up, clients.rejected, len(clients.silent)) == ([2, 3], 2, MAX_SILENT)


# -- descriptors ------------------------------------------------------------------------------------------------------


class Lingering:
    """A descriptor that takes long to be closed: of a connection whose peer does not read, and which lingers."""

    def __init__(self) -> None:
        with socket.create_server(("127.0.0.1", 0)) as listener:
            sock = socket.create_connection(listener.getsockname())
            self._peer, _ = listener.accept()
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, (1).to_bytes(4, "little") + (600).to_bytes(4, "little"))
        sock.setblocking(False)
        try:
            while True:
                sock.send(bytes(1 << 16))
        except BlockingIOError:
            self.fd = sock.detach()

    def let_go(self) -> None:
        """Let it be closed."""
        self._peer.close()


@pytest.fixture
def lingering() -> Iterator[Callable[[], Lingering]]:
    """A function that makes such descriptors; in the end all are let go."""
    with ExitStack() as stack:

        def make() -> Lingering:
            made = Lingering()
            stack.callback(made.let_go)
            return made

        yield make


async def test_descriptors_are_closed() -> None:
    clients = Clients(0o666, GROUP)
    (client,) = admit(clients, ALICE)
    fds = null(), null()
    with trio.fail_after(10):
        await client.close(fds)
    assert [is_open(fd) for fd in fds] == [False, False]
    with trio.fail_after(10):
        await client.close([fds[0]])  # as close(2) says: whatever it answers, the descriptor is gone


async def test_user_s_descriptors_hold_up_that_user_only(lingering: Callable[[], Lingering]) -> None:
    clients = Clients(0o666, GROUP)
    (alice,), (bob,) = admit(clients, ALICE), admit(clients, BOB)
    slow = [lingering() for _ in range(4)]
    done = alice.discard(each.fd for each in slow)
    await wait_all_tasks_blocked()
    fd, other = null(), null()
    (behind,) = alice.discard([fd])
    with trio.fail_after(10):
        await bob.close([other])
        assert await bob._user.run_in_thread(os.getpid) == os.getpid()
    with trio.move_on_after(0.05) as scope:
        await behind.wait()
    assert scope.cancelled_caught
    assert is_open(fd)
    assert not any(event.is_set() for event in done)
    slow[0].let_go()
    with trio.fail_after(10):
        await done[0].wait()
        await behind.wait()
    assert not is_open(fd)
    for each, event in zip(slow, done, strict=True):
        each.let_go()
        with trio.fail_after(10):
            await event.wait()


async def test_descriptors_count_until_they_are_closed(
    lingering: Callable[[], Lingering], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("memfs.owners.admission.MAX_PER_USER", 3)
    clients = Clients(0o666, GROUP)
    (client,) = admit(clients, ALICE)
    slow = [lingering() for _ in range(3)]
    done = client.discard(each.fd for each in slow)
    client.disconnected()
    assert clients.connections == 0
    with pytest.raises(Rejected, match="it has 3 connections"):
        clients.admit(someone(), lambda: None)
    admit(clients, BOB)
    slow[0].let_go()
    with trio.fail_after(10):
        await done[0].wait()
    admit(clients, ALICE)
    with pytest.raises(Rejected):
        clients.admit(someone(), lambda: None)
    for each, event in zip(slow, done, strict=True):
        each.let_go()
        with trio.fail_after(10):
            await event.wait()


async def test_cancelled_close_closes_all_the_same(lingering: Callable[[], Lingering]) -> None:
    clients = Clients(0o666, GROUP)
    (client,) = admit(clients, ALICE)
    slow, fd = lingering(), null()
    with trio.move_on_after(0.05) as scope:
        await client.close([slow.fd, fd])
    assert scope.cancelled_caught
    slow.let_go()
    with trio.fail_after(10):
        while is_open(fd) or is_open(slow.fd):  # noqa: ASYNC110
            await trio.sleep(0.005)


async def test_without_a_thread_it_is_tried_again(autojump_clock: MockClock, monkeypatch: pytest.MonkeyPatch) -> None:
    clients = Clients(0o666, GROUP)
    (client,) = admit(clients, ALICE)
    fd = null()
    run_sync, refusals = trio.to_thread.run_sync, [RuntimeError("can't start new thread")] * 3

    async def run_sync_if_there_is_a_thread(*arguments: object, **options: object) -> object:
        if refusals:
            raise refusals.pop()
        return await run_sync(*arguments, **options)  # type: ignore[arg-type]

    monkeypatch.setattr("trio.to_thread.run_sync", run_sync_if_there_is_a_thread)
    with raises(errno.EAGAIN, match="memfs can have no thread for that"):
        await client._user.run_in_thread(os.getpid)
    assert len(refusals) == 2
    await client.close([fd])
    assert (is_open(fd), refusals) == (False, [])


async def test_client_that_was_rejected_is_disconnected_immediately() -> None:
    """However many there are, nothing of them is left."""
    clients = Clients(0o600, GROUP)
    for _ in range(100):
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with theirs:
            clients.reject(ours)
            assert ours.fileno() == -1
            assert theirs.recv(1) == b""


@pytest.mark.parametrize("data", [b"", b"x"], ids=["empty message", "message"])
async def test_connection_with_something_in_its_queue_is_closed_elsewhere(data: bytes) -> None:
    """A descriptor in it may be one whose close waits. An empty message is not taken for the end."""
    clients, closer = Clients(0o600, GROUP), Closer.start()
    reading, writing = os.pipe()
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with theirs:
        theirs.sendmsg([data], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, struct.pack("i", writing))])
        os.close(writing)
        clients.reject(ours, closer.close_connection)
        assert ours.fileno() == -1
        with trio.fail_after(10):
            await trio.lowlevel.wait_readable(reading)
        assert os.read(reading, 1) == b""  # what lay in the queue is closed
    assert not closer._line.asked
    os.close(reading)
    closer.stop()


def test_requests_of_a_user_are_limited_on_all_its_connections_together(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("memfs.owners.admission.MAX_REQUESTS", 4)
    clients = Clients(0o666, GROUP)
    alice, again, bob, root = (*admit(clients, ALICE, 2), *admit(clients, BOB), *admit(clients, 0))
    with ExitStack() as stack:
        for _ in range(2):
            stack.enter_context(alice.request())
            stack.enter_context(again.request())
        for client in (alice, again):
            with raises(errno.ENOBUFS), client.request():
                pass
        with bob.request():
            pass
        for _ in range(10):
            stack.enter_context(root.request())
    with again.request():
        pass
