"""What a client of the socket may send or do to break the protocol: it is cut off, and nobody else notices."""

from __future__ import annotations

import array
import contextlib
import errno
import os
import resource
import signal
import socket
import struct
import subprocess
import sys
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import pytest
import trio
import trio.lowlevel

from memfs.contract.protocol.connection import MAX_DESCRIPTORS, MAX_MESSAGE
from memfs.contract.protocol.messages import (
    Ack,
    Done,
    Failed,
    FileId,
    GetPfn,
    Hello,
    InvalidateBegin,
    Message,
    PutPfn,
    Register,
    Registered,
    Unregister,
)
from memfs.contract.sys.libc import umount
from memfs.contract.units import PageIndex, PageRange
from memfs.owners.admission import MAX_SILENT
from tests.helpers import packed

from .conftest import Memfs
from .owner import Owner, connected, shell
from .test_leaks import resident

CUT_OFF = "broke the protocol and is cut off"
ONE_PAGE = PageRange(PageIndex(0), PageIndex(1))


class Client:
    """A socket on which anything may be said."""

    def __init__(self, memfs: Memfs, *, hello: bool = True) -> None:
        self.socket = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self.socket.connect(str(memfs.socket))
        self.socket.settimeout(20)
        if hello:
            self.send(packed(Hello(name="hostile"), 1))
            assert self.socket.recv(MAX_MESSAGE)

    def send(self, data: bytes, fds: list[int] | None = None) -> None:
        rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", fds))] if fds else []
        self.socket.sendmsg([data], rights)

    def hung_up(self) -> bool:
        """Whether the connection ends; answers that came before are read."""
        with contextlib.suppress(ConnectionError):
            while self.socket.recv(MAX_MESSAGE):
                pass
        return True

    def close(self) -> None:
        self.socket.close()

    def __del__(self) -> None:
        self.close()  # not every test waits for the end of what it has begun


def descriptors(memfs: Memfs) -> Counter[str]:
    """What the daemon has open, and how often; sockets and pipes without their numbers."""
    opened: Counter[str] = Counter()
    for fd in Path(f"/proc/{memfs.process.pid}/fd").iterdir():
        with contextlib.suppress(FileNotFoundError):  # closed meanwhile
            opened[fd.readlink().name.partition("[")[0]] += 1
    return opened


async def settled(holds: Callable[[], bool]) -> bool:
    """Whether something comes true, soon, that another process does."""
    deadline = time.monotonic() + 10
    while not holds():
        if time.monotonic() > deadline:
            return False
        await trio.sleep(0.01)
    return True


async def left_open(memfs: Memfs, before: Counter[str]) -> Counter[str]:
    """What the daemon has open beyond what it had, when that has had time to end."""
    more = Counter[str]()

    def none() -> bool:
        nonlocal more
        more = descriptors(memfs) - before  # looked at once: what it opens next is another matter
        return not more

    await settled(none)
    return more


def is_running(pid: int) -> bool:
    """Whether a process has not closed its files yet."""
    with contextlib.suppress(FileNotFoundError):
        return "State:\tZ" not in Path(f"/proc/{pid}/status").read_text()
    return False


def log_lines(memfs: Memfs) -> list[str]:
    return memfs.log.read_text().splitlines()


@contextlib.asynccontextmanager
async def bystander(memfs: Memfs) -> AsyncIterator[Owner]:
    """Another owner, which is told of a punch and acknowledges it after whatever happened in the block."""
    path = memfs.path / "bystander"
    await shell("fallocate", "-l", "64K", path, cwd=memfs.path)
    async with connected(memfs.socket) as owner:
        registered, fds = await owner.registered(path)
        yield owner
        heard = len(owner.heard)
        with trio.fail_after(10):
            assert (await shell("fallocate", "-p", "-l", "4K", path, cwd=memfs.path)).returncode == 0
        assert owner.heard[heard] == InvalidateBegin(registered.file, ONE_PAGE)
        for fd in fds:
            os.close(fd)


HELLO, REGISTER = packed(Hello(), 2), packed(Register(), 2)
#: name: messages after a Hello, each with how many descriptors
BROKEN: dict[str, list[tuple[bytes, int]]] = {
    "malformed": [(b"\xff" * 100, 0)],
    "unknown type": [(struct.pack("<HHIQ", 1, 77, 16, 2), 0)],
    "another version": [(struct.pack("<HHIQ", 2, Register.TYPE, 16, 2), 1)],
    "truncated header": [(REGISTER[:9], 1)],
    "truncated body": [(packed(GetPfn(FileId(1), ONE_PAGE, False), 2)[:-1], 0)],
    "longer than it says": [(REGISTER + b"x", 1)],
    "empty with a descriptor": [(b"", 1)],
    "oversized": [(REGISTER + bytes(MAX_MESSAGE), 1)],
    "empty range": [(struct.pack("<HHIQQQQB", 1, GetPfn.TYPE, 41, 2, 1, 5, 5, 0), 0)],
    "backward range": [(struct.pack("<HHIQQQQB", 1, GetPfn.TYPE, 41, 2, 1, 6, 5, 0), 0)],
    "huge range": [(struct.pack("<HHIQQQQB", 1, GetPfn.TYPE, 41, 2, 1, 0, (1 << 64) - 1, 0), 0)],
    "neither true nor false": [(struct.pack("<HHIQQQQB", 1, PutPfn.TYPE, 41, 2, 1, 5, 6, 2), 0)],
    "Hello again": [(HELLO, 0)],
    "replayed": [(packed(Unregister(FileId(1)), 2), 0)] * 2,
    "reordered": [(packed(Unregister(FileId(1)), 3), 0), (packed(Unregister(FileId(1)), 2), 0)],
    "acknowledges nothing": [(packed(Ack(), 2), 0)],
    "speaks as the store": [(packed(InvalidateBegin(FileId(1), ONE_PAGE), 2), 0)],
    "answers as the store": [(packed(Done(), 1), 0)],
    "descriptor beside Unregister": [(packed(Unregister(FileId(1)), 2), 1)],
    "no descriptor": [(REGISTER, 0)],
    "one descriptor too many": [(REGISTER, 2)],
    "more than fit": [(REGISTER, MAX_DESCRIPTORS + 1)],
    "as many as can be sent": [(REGISTER, 253)],
}


@pytest.mark.parametrize("name", BROKEN)
async def test_offender_is_cut_off_with_one_line(memfs: Memfs, name: str) -> None:
    memfs.expected.append(CUT_OFF)
    async with bystander(memfs):
        before = descriptors(memfs)
        client = await trio.to_thread.run_sync(Client, memfs)
        for data, fds in BROKEN[name]:
            with contextlib.suppress(BrokenPipeError):
                client.send(data, [0] * fds)
        assert await trio.to_thread.run_sync(client.hung_up)
        client.close()
        assert not await left_open(memfs, before)
        assert await settled(lambda: bool(log_lines(memfs)))
    assert [CUT_OFF in line for line in log_lines(memfs)] == [True]


@pytest.mark.parametrize("message", [Register(), GetPfn(FileId(1), ONE_PAGE, True), Ack(), Unregister(FileId(1))])
async def test_anything_before_hello_is_an_offence(memfs: Memfs, message: Message) -> None:
    memfs.expected.append(CUT_OFF)
    async with bystander(memfs):
        client = Client(memfs, hello=False)
        client.send(packed(message, 1), [0] * isinstance(message, Register))
        assert await trio.to_thread.run_sync(client.hung_up)
        client.close()
        assert await settled(lambda: bool(log_lines(memfs)))
    assert len(log_lines(memfs)) == 1


async def test_flood_is_held_back_and_costs_no_memory(memfs: Memfs) -> None:
    """A client that asks and asks, and never reads an answer, ends up waiting itself."""
    async with bystander(memfs):
        before = resident(memfs.process.pid), descriptors(memfs)
        flooders = [await trio.to_thread.run_sync(Client, memfs) for _ in range(4)]
        for client in flooders:
            client.socket.setblocking(False)
        sent = 0
        deadline = time.monotonic() + 3
        while time.monotonic() < deadline:
            for client in flooders:
                with contextlib.suppress(BlockingIOError):
                    client.send(packed(Unregister(FileId(1)), sent + 2))
            sent += 1
            await trio.lowlevel.checkpoint()
        with trio.fail_after(10):  # and others are answered while it goes on
            async with connected(memfs.socket) as owner:
                assert isinstance(await owner.ask(Unregister(FileId(1))), Failed)
        assert resident(memfs.process.pid) - before[0] < 8 << 20
        for client in flooders:
            client.close()
        assert not await left_open(memfs, before[1])


async def test_thousands_that_connect_and_say_nothing(memfs: Memfs) -> None:
    memfs.expected += ["is disconnected"]
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(hard, len(os.listdir("/proc/self/fd")) + 4096), hard))
    try:
        async with bystander(memfs):
            before = resident(memfs.process.pid), descriptors(memfs)
            silent = [await trio.to_thread.run_sync(lambda: Client(memfs, hello=False)) for _ in range(3000)]
            async with connected(memfs.socket) as owner:  # whoever says Hello is heard, and after all of them
                assert isinstance(await owner.register(memfs.path / "bystander"), Failed)
            assert not await left_open(memfs, before[1] + Counter({"socket:": MAX_SILENT}))
            assert resident(memfs.process.pid) - before[0] < 16 << 20
            ended = 0
            for client in silent:
                client.socket.setblocking(False)
                with contextlib.suppress(BlockingIOError):
                    ended += client.socket.recv(1) == b""
            assert ended >= 3000 - MAX_SILENT
            for client in silent:
                client.close()
            assert not await left_open(memfs, before[1])
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


# -- descriptors that cannot be closed ---------------------------------------------------------------------------------


@pytest.mark.parametrize("what", ["file", "epoll"])
async def test_descriptor_that_is_never_done_with(memfs: Memfs, tmp_path: Path, what: str) -> None:
    if os.geteuid() != 0:
        pytest.skip("mounts a filesystem, so it needs root")
    await trio.Path(tmp_path / "stuck").mkdir()
    async with bystander(memfs):
        before = descriptors(memfs)
        command = [sys.executable, "-m", "tests.e2e.stuck_filesystem", str(tmp_path / "stuck"), str(memfs.socket), what]
        root = Path(__file__).parents[2]
        hostile = await trio.lowlevel.open_process(command, stdout=subprocess.PIPE, cwd=root, start_new_session=True)
        assert hostile.stdout is not None
        try:
            with trio.fail_after(10):
                assert (await hostile.stdout.receive_some()).startswith(b"asked")
                if what == "epoll":
                    await trio.sleep(1)  # it is said before the descriptor is sent
                # A thread of the daemon is held up now, for as long as it pleases that filesystem.
                async with connected(memfs.socket) as owner:
                    assert isinstance(await owner.ask(Unregister(FileId(1))), Failed)
                await shell("cat", memfs.path / "bystander", cwd=memfs.path)
        finally:
            os.killpg(hostile.pid, signal.SIGKILL)
            await hostile.wait()
            await hostile.stdout.aclose()
            umount(str(tmp_path / "stuck"), 2)  # MNT_DETACH
    assert not await left_open(memfs, before)


async def test_queue_that_lingers(memfs: Memfs) -> None:
    """With a connection goes what lies in its queue: here a TCP socket that waits for its data to be taken."""
    memfs.expected.append(CUT_OFF)
    with socket.create_server(("127.0.0.1", 0)) as listener:
        lingers = socket.create_connection(listener.getsockname())
        takes_nothing, _ = listener.accept()
    lingers.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 60))
    lingers.setblocking(False)
    with contextlib.suppress(BlockingIOError):
        while True:
            lingers.send(bytes(1 << 16))
    async with bystander(memfs):
        before = descriptors(memfs)
        client = await trio.to_thread.run_sync(Client, memfs)
        memfs.process.send_signal(signal.SIGSTOP)  # so that both are in the queue when it reads the first
        try:
            client.socket.send(b"garbage")
            client.send(REGISTER, [lingers.fileno()])
            lingers.close()
        finally:
            memfs.process.send_signal(signal.SIGCONT)
        with trio.fail_after(10):
            async with connected(memfs.socket) as owner:
                assert isinstance(await owner.ask(Unregister(FileId(1))), Failed)
        takes_nothing.close()
        client.close()
    assert not await left_open(memfs, before)


# -- too many descriptors ----------------------------------------------------------------------------------------------


async def fill(memfs: Memfs, held: list[Client]) -> None:
    """Connect until that is refused, for want of descriptors."""
    while len(held) < 100:
        try:
            held.append(await trio.to_thread.run_sync(Client, memfs))
        except (ConnectionError, AssertionError):  # rejected
            return
    raise AssertionError("nothing is refused")


async def test_descriptor_limit_of_the_daemon(memfs: Memfs) -> None:
    """Nothing hangs, every refusal says EMFILE, and all is well again when there are descriptors."""
    memfs.expected += ["rejected: Too many open files", "cannot"]
    pid = memfs.process.pid
    limits = resource.prlimit(pid, resource.RLIMIT_NOFILE)
    async with bystander(memfs), connected(memfs.socket) as owner:
        await shell("touch", "file", "other", cwd=memfs.path)
        fd = await trio.to_thread.run_sync(os.open, memfs.path / "other", os.O_RDWR)
        highest = max(map(int, os.listdir(f"/proc/{pid}/fd")))
        resource.prlimit(pid, resource.RLIMIT_NOFILE, (highest + 1, limits[1]))
        held = list[Client]()
        try:
            with trio.fail_after(20):
                while True:  # what was closed before may become free at any time
                    await fill(memfs, held)
                    opened = await shell("cat", "file", cwd=memfs.path)
                    registered = await owner.ask(Register(), [fd])
                    if opened.returncode and isinstance(registered, Failed):
                        break
                    if isinstance(registered, Registered):
                        await owner.ask(Unregister(registered.file))
                assert b"Too many open files" in opened.stderr
                assert registered.errno == errno.EMFILE
                statistics = await shell("stat", "file", cwd=memfs.path)
                assert statistics.returncode == 0
        finally:
            resource.prlimit(pid, resource.RLIMIT_NOFILE, limits)
        for client in held:
            client.close()
        assert isinstance(await owner.ask(Register(), [fd]), Registered)
        assert (await shell("cat", "file", cwd=memfs.path)).returncode == 0
        async with connected(memfs.socket) as other:
            assert isinstance(await other.ask(Unregister(FileId(1))), Failed)
        await trio.to_thread.run_sync(os.close, fd)
    assert len([line for line in log_lines(memfs) if "is rejected" in line]) < 5


@pytest.mark.skipif(os.geteuid() != 0, reason="mounts again with other options, so it needs root")
async def test_without_a_descriptor_left_it_goes_on_and_unmounts(memfs: Memfs) -> None:
    """Whenever anything is mounted anywhere the daemon looks at mounts, and to unmount it has to know where it is."""
    memfs.expected += ["Too many open files", "is rejected"]
    pid = memfs.process.pid
    limits = resource.prlimit(pid, resource.RLIMIT_NOFILE)
    highest = max(map(int, os.listdir(f"/proc/{pid}/fd")))
    resource.prlimit(pid, resource.RLIMIT_NOFILE, (highest + 1, limits[1]))
    held = list[Client]()
    with trio.fail_after(20):
        await fill(memfs, held)
        while "the options of the mount cannot be read now" not in memfs.log.read_text():
            await shell("mount", "-o", "remount,strictatime", memfs.path, cwd=Path("/"))
            await shell("mount", "-o", "remount,relatime", memfs.path, cwd=Path("/"))
            await fill(memfs, held)
        assert (await shell("stat", ".", cwd=memfs.path)).returncode == 0
    memfs.process.send_signal(signal.SIGTERM)
    await trio.to_thread.run_sync(memfs.see_end)
    for client in held:
        client.close()


# -- a client that forks -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("first", ["punch", "register"])
async def test_child_that_holds_a_dead_owners_connection(memfs: Memfs, first: str) -> None:
    """A fork inherits socket and files; its parent was the owner, and dies."""
    memfs.expected.append("is fenced: its process is gone")
    path = memfs.path / "file"
    await shell("fallocate", "-l", "64K", path, cwd=memfs.path)
    script = f"""
import os, sys, time
sys.path.insert(0, {str(Path(__file__).parents[2])!r})
from pathlib import Path
from types import SimpleNamespace
from tests.e2e.test_hostile_messages import Client, REGISTER
client = Client(SimpleNamespace(socket={str(memfs.socket)!r}))
client.send(REGISTER, [os.open({str(path)!r}, os.O_RDWR)])
assert client.socket.recv(1000)
if child := os.fork():
    print(child, flush=True)
    os._exit(0)
time.sleep(60)
"""
    process = await trio.to_thread.run_sync(
        lambda: subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True)
    )
    assert process.stdout is not None
    child = int(await trio.to_thread.run_sync(process.stdout.readline))
    try:
        await trio.to_thread.run_sync(process.wait)
        with trio.fail_after(3):  # less than the timeout for an owner that does not answer
            if first == "punch":
                assert (await shell("fallocate", "-p", "-l", "4K", path, cwd=memfs.path)).returncode == 0
            async with connected(memfs.socket) as owner:
                assert isinstance(await owner.register(path), Registered)
    finally:
        os.kill(child, signal.SIGKILL)
        process.stdout.close()
        assert await settled(lambda: not is_running(child))
