"""Owners outlive the daemon: whenever it is killed, they come back to the next one and find all as it was, once."""

from __future__ import annotations

import base64
import errno
import fcntl
import hashlib
import json
import os
import signal
import socket
import struct
import sys
from collections.abc import AsyncIterator, Callable, Coroutine, Sequence
from contextlib import asynccontextmanager, closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import trio
from trio.testing import wait_all_tasks_blocked

from memfs.contract.conversion import convert, key_of
from memfs.contract.faults import Point
from memfs.contract.page_map import PageMapView
from memfs.contract.protocol.connection import Connection, RequestId, Role
from memfs.contract.protocol.messages import (
    AllowPreserve,
    ConvertBegin,
    ConvertEnd,
    Done,
    Failed,
    Fallocate,
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
    Populate,
    PutPfn,
    Register,
    Registered,
    Token,
    Unregister,
)
from memfs.contract.protocol.peer import close_all
from memfs.contract.sys.libc import PUNCH_HOLE, fallocate
from memfs.contract.units import PAGE_SIZE, ByteOffset, PageIndex, PageRange
from tests.helpers import pages

from .conftest import Memfs, MountMemfs, memfs_command, run, stat_json
from .injection import Injection
from .owner import Owner, connected
from .test_survival import EXPECTED

NO_SUCH_OWNER = "no such owner, or not any more: its registrations have ended"
COMMITS = (Point.BEFORE_COMMIT, Point.AFTER_COMMIT)
SIZE = 1 << 20
in_thread = trio.to_thread.run_sync


@dataclass
class Pair:
    """A shared and a private file on a mount that survives, open, and where the next death is armed."""

    memfs: Memfs
    injection: Injection
    shared: int
    private: int

    def close(self) -> None:
        """Close the files, and have no more deaths."""
        self.injection.disarm()
        for fd in (self.shared, self.private):
            os.close(fd)

    async def kill(self) -> None:
        """Kill the daemon, wherever it is."""
        state = await in_thread(stat_json, self.memfs.path)
        os.kill(state["pid"], signal.SIGKILL)

    async def owned(self, number: int = 1) -> dict[str, Any]:
        """What `memfs stat` says of an owner, the first one."""
        registry = (await in_thread(stat_json, self.memfs.path))["registry"]
        (owner,) = [each for each in registry if each["owner"] == number]
        assert isinstance(owner, dict)
        return owner


@asynccontextmanager
async def open_pair(mount_memfs: MountMemfs, injection: Injection, options: str = "") -> AsyncIterator[Pair]:
    def make() -> Pair:
        memfs = mount_memfs(f"size=64m,survive=on{options}")
        memfs.expected = list(EXPECTED)
        assert run(*memfs_command("create", memfs.path / "private", "--seals", "guest", "--size", "1m")).returncode == 0
        (memfs.path / "shared").write_bytes(b"x" * SIZE)
        fds = [os.open(memfs.path / name, os.O_RDWR) for name in ("shared", "private")]
        return Pair(memfs, injection, *fds)

    pair = await in_thread(make)
    try:
        yield pair
    finally:
        await in_thread(pair.close)


async def registered(owner: Owner, fd: int) -> FileId:
    """Register the file behind a descriptor."""
    reply = await owner.ask(Register(), [fd])
    assert isinstance(reply, Registered), reply
    return reply.file


async def test_what_an_owner_has_it_has_again(mount_memfs: MountMemfs, in_memfs: Injection) -> None:
    """Files, frames, locks and permissions, be the file unlinked; and what it asks meanwhile is answered."""
    async with open_pair(mount_memfs, in_memfs) as pair, connected(pair.memfs.socket) as owner:
        files = [await registered(owner, fd) for fd in (pair.shared, pair.private, pair.private)]
        assert files[1] == files[2]
        await in_thread((pair.memfs.path / "private").unlink)
        locked = await owner.client.get_pfn(files[1], pages(3, 9), alloc=True, lock=True)
        shared = await owner.client.get_pfn(files[0], pages(0, 256), alloc=True)
        assert await owner.ask(AllowPreserve(files[1])) == Done()
        before = await pair.owned()
        for deaths in (1, 2):
            await pair.kill()
            assert await owner.client.get_pfn(files[1], pages(3, 9), alloc=False) == locked
            assert await owner.client.get_pfn(files[0], pages(0, 256), alloc=True) == shared
            assert owner.client.resumed == deaths
            assert await pair.owned() == before
        key = await in_thread(key_of, pair.shared)
        await in_thread(lambda: convert(pair.private, key, [pages(20, 21)], to_private=True, preserve=True))
        for answer in (Done(), Done()):
            assert await owner.ask(Unregister(files[1])) == answer
        assert isinstance(await owner.ask(Unregister(files[1])), Failed)
        later = await registered(owner, pair.private)
        assert later not in files


@pytest.mark.parametrize("stray", [False, True])
async def test_the_page_map_of_a_file_that_was_empty_is_the_one_that_its_owner_has(
    mount_memfs: MountMemfs, in_memfs: Injection, stray: bool
) -> None:
    async with open_pair(mount_memfs, in_memfs) as pair, connected(pair.memfs.socket) as owner:
        reply = await owner.client.request(Register(), [pair.private])
        page_map = PageMapView(reply.fds[1])
        if stray:  # it dies with pages that nobody was told of
            pair.injection.arm(Point.AFTER_ALLOCATE)
            await in_thread(fallocate, pair.private, 0, 0, PAGE_SIZE)
            await in_thread(fallocate, pair.private, PUNCH_HOLE, 0, PAGE_SIZE)
        await pair.kill()
        await in_thread(fallocate, pair.private, 0, 0, PAGE_SIZE)
        assert page_map.is_allocated(PageIndex(0))
        page_map.close()
        close_all(reply.fds)


Step = Callable[[Owner, Pair, FileId], Coroutine[Any, Any, Message]]


async def register(owner: Owner, pair: Pair, file: FileId) -> Message:
    return await owner.ask(Register(), [pair.private])


async def unregister(owner: Owner, pair: Pair, file: FileId) -> Message:
    return await owner.ask(Unregister(file))


async def lock(owner: Owner, pair: Pair, file: FileId) -> Message:
    return await owner.ask(GetPfn(file, pages(0, 4), alloc=False, lock=True))


async def unlock(owner: Owner, pair: Pair, file: FileId) -> Message:
    return await owner.ask(PutPfn(file, pages(0, 4), dirty=False))


async def times(owner: Owner, pair: Pair, step: Step, file: FileId) -> int:
    """How often a step succeeds until it is refused."""
    count = 0
    while not isinstance(await step(owner, pair, file), Failed):
        count += 1
    return count


@pytest.mark.parametrize("step", [register, unregister, lock, unlock])
async def test_what_an_owner_asks_for_is_done_once(mount_memfs: MountMemfs, in_memfs: Injection, step: Step) -> None:
    """Killed before the commit of it or after, it gets one answer, and the file is registered or locked so often."""
    async with open_pair(mount_memfs, in_memfs) as pair:
        for point in COMMITS:
            async with connected(pair.memfs.socket) as owner:
                file = await registered(owner, pair.private)
                await registered(owner, pair.private)
                await owner.client.get_pfn(file, pages(0, 4), alloc=True, lock=True)
                await lock(owner, pair, file)
                pair.injection.arm(point)
                answer = await step(owner, pair, file)
                assert not isinstance(answer, Failed)
                assert not pair.injection.armed, point
                if isinstance(answer, PfnReply):
                    assert [(run.pages, run.pfn is not None) for run in answer.runs] == [(pages(0, 4), True)]
                more = 1 if step in (register, lock) else -1
                locked = 2 + more * (step in (lock, unlock))
                assert await times(owner, pair, unlock, file) == locked
                assert await times(owner, pair, unregister, file) == 2 + more * (step in (register, unregister))


@pytest.mark.parametrize("point", COMMITS)
async def test_what_is_populated_is_measured_once(mount_memfs: MountMemfs, in_memfs: Injection, point: Point) -> None:
    async with open_pair(mount_memfs, in_memfs) as pair, connected(pair.memfs.socket) as owner:
        content = os.memfd_create("content", os.MFD_ALLOW_SEALING)
        os.write(content, b"c" * PAGE_SIZE)
        fcntl.fcntl(content, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK)
        pair.injection.arm(point)
        answer = await owner.ask(Populate(pages(7, 8), ByteOffset(0)), [pair.private, content])
        assert not pair.injection.armed, point
        os.close(content)
        record = (7).to_bytes(8, "little") + b"c" * PAGE_SIZE
        restarted = struct.pack("<3Q", 2**64 - 3, 0, 0)
        once = hashlib.sha384(record).digest()
        file = await registered(owner, pair.private)
        launched = await owner.ask(Launch(file))
        if point is Point.AFTER_COMMIT:
            assert answer == Measured(once)
            assert launched == Measured(hashlib.sha384(restarted + once).digest())
        else:
            assert answer == launched == Measured(hashlib.sha384(restarted + record).digest())


class Memory:
    """What an owner must know: which pages it may not map, and which of the private file are private."""

    def __init__(self) -> None:
        self.begun: list[tuple[object, ...]] = []
        self.idle = trio.Event()

    async def hear(self, message: Notification) -> None:
        match message:
            case InvalidateBegin(file, where):
                assert (file, where) not in self.begun
                self.begun.append((file, where))
            case InvalidateEnd(file, where):
                self.begun.remove((file, where))
            case ConvertBegin(shared, private):
                assert (shared, private) not in self.begun
                self.begun.append((shared, private))
            case ConvertEnd(shared, private):
                self.begun.remove((shared, private))
        self.idle.set()


ORDER = (
    *(Point.BEFORE_BEGIN, Point.AFTER_BEGIN, Point.BEFORE_FREE, Point.AFTER_FREE, Point.BEFORE_ACCOUNT),
    *(Point.AFTER_ACCOUNT, Point.BEFORE_END, Point.AFTER_END),
)
ALLOCATING = (
    *(Point.BEFORE_ALLOCATE, Point.AFTER_ALLOCATE, Point.BEFORE_ACCOUNT, Point.AFTER_ACCOUNT),
    *(Point.BEFORE_TELL, Point.AFTER_TELL),
)
#: to punch and to allocate pages changes nothing that is committed
CONVERTING = (Point.BEFORE_ALLOCATE, Point.AFTER_ALLOCATE, *ORDER, *COMMITS)


@pytest.mark.parametrize("do", ["punch", "allocate", "to private", "to shared"])
async def test_what_was_begun_ends_and_is_done_once(mount_memfs: MountMemfs, in_memfs: Injection, do: str) -> None:
    """Wherever the daemon dies in it, its caller gets one result, and the owner hears of an end to each beginning."""
    points = {"punch": ORDER, "allocate": ALLOCATING}.get(do, CONVERTING)
    async with open_pair(mount_memfs, in_memfs) as pair, connected(pair.memfs.socket) as owner:
        memory = Memory()
        hear = owner.hear

        async def both(message: Notification) -> None:
            await hear(message)
            await memory.hear(message)

        owner.hear = both  # type: ignore[method-assign]
        shared, private = await registered(owner, pair.shared), await registered(owner, pair.private)
        key = await in_thread(key_of, pair.shared)

        def call(where: PageRange, do: str) -> None:
            match do:
                case "punch":
                    fallocate(pair.private, PUNCH_HOLE, where.offset, where.nbytes)
                case "allocate":
                    fallocate(pair.private, 0, where.offset, where.nbytes)
                case _:
                    convert(pair.private, key, [where], to_private=do == "to private")

        def blocks() -> list[int]:
            return [os.fstat(fd).st_blocks // 8 for fd in (pair.shared, pair.private)]

        undone = {"punch": "allocate", "allocate": "punch", "to private": "to shared", "to shared": "to private"}
        for number, point in enumerate(points):
            where = pages(8 * number, 8 * number + 5)
            await in_thread(call, where, undone[do])
            before = await in_thread(blocks)
            owner.heard.clear()
            pair.injection.arm(point)
            await in_thread(call, where, do)
            assert not pair.injection.armed, point
            assert await in_thread(blocks) == [
                before[0] + {"to shared": 5 if before[0] < 256 else 0, "to private": -5}.get(do, 0),
                before[1] + (5 if do in ("allocate", "to private") else -5),
            ], point
            expected = (Fallocate,) if do == "allocate" else (InvalidateBegin, ConvertBegin)
            assert any(isinstance(each, expected) for each in owner.heard), f"it heard of nothing: {point}"
            await owner.client.get_pfn(private, pages(0, 1), alloc=False)  # it is back
            while memory.begun:  # the last end may be on its way
                memory.idle = trio.Event()
                await memory.idle.wait()
        assert owner.client.resumed == len(points)
        assert {shared, private} == {each["file"] for each in (await pair.owned())["files"]}


async def test_killed_before_the_owner_has_acknowledged(mount_memfs: MountMemfs, in_memfs: Injection) -> None:
    """Nothing is freed until it does, to the next daemon."""
    async with open_pair(mount_memfs, in_memfs) as pair, connected(pair.memfs.socket) as owner:
        file = await registered(owner, pair.private)
        await in_thread(fallocate, pair.private, 0, 0, 8 * PAGE_SIZE)
        begun, acknowledge = trio.Event(), trio.Event()
        heard = []

        async def hear(message: Notification) -> None:
            nonlocal begun
            heard.append(message)
            if isinstance(message, InvalidateBegin):
                begun.set()
                await acknowledge.wait()

        owner.hear = hear  # type: ignore[method-assign]
        begin, end = InvalidateBegin(file, pages(0, 8)), InvalidateEnd(file, pages(0, 8))
        async with trio.open_nursery() as nursery:
            nursery.start_soon(in_thread, fallocate, pair.private, PUNCH_HOLE, 0, 8 * PAGE_SIZE)
            await begun.wait()
            begun = trio.Event()
            await pair.kill()
            with trio.fail_after(20):
                await begun.wait()
            assert heard == [begin, end, begin]
            assert await in_thread(lambda: os.fstat(pair.private).st_blocks) == 64
            acknowledge.set()
        assert await in_thread(lambda: os.fstat(pair.private).st_blocks) == 0


class Raw:
    """A connection that says what the test says, and nothing by itself."""

    def __init__(self, path: Path, token: Token | None = None) -> None:
        self.protocol = Connection(Role.OWNER)
        self.socket = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self.socket.settimeout(20)
        self.socket.connect(str(path))
        self.reply = self.ask(Hello(name="raw") if token is None else Hello(name="raw", token=token))

    def ask(self, message: Message, fds: Sequence[int] = (), repeats: RequestId | None = None) -> Message:
        _, data = self.protocol.send(message, descriptors=len(fds), repeats=repeats)
        socket.send_fds(self.socket, [data], fds)
        data, received, _, _ = socket.recv_fds(self.socket, 1 << 16, 4)
        for fd in received:
            os.close(fd)
        return self.protocol.receive(data, len(received)).message

    def close(self) -> None:
        self.socket.close()


def register_as(memfs: Memfs, uid: int, token: Token) -> str:
    """Say a token as another user, in a process of its own; returns what memfs answers."""
    script = (
        "import os\n"
        "from pathlib import Path\n"
        "from tests.e2e.test_owners_come_back import Raw\n"
        "from memfs.contract.protocol.messages import Token\n"
        f"os.chdir({str(memfs.socket.parent)!r})\n"  # from here, it need not get into what is above
        f"os.setuid({uid})\n"
        f"print(Raw(Path({memfs.socket.name!r}), Token(bytes.fromhex({token.hex()!r}))).reply)\n"
    )
    done = run(sys.executable, "-c", script, cwd=Path(__file__).parents[2])
    return done.stdout + done.stderr


def test_a_token_is_a_secret_of_its_user(mount_memfs: MountMemfs, in_memfs: Injection) -> None:
    """No other token is good, nor this one for another user; a daemon that lives takes none; it is shown nowhere."""
    if os.geteuid() != 0:
        pytest.skip("acts as another user")
    memfs = mount_memfs("size=64m,survive=on,socket_mode=0666", "-v")
    memfs.expected = [*EXPECTED, "level=info", "is fenced: memfs was killed, and it did not come back within 5 s"]
    memfs.socket.parent.chmod(0o755)
    with closing(Raw(memfs.socket)) as owner, (memfs.path / "file").open("w+b") as file:
        hello = owner.reply
        assert isinstance(hello, HelloReply)
        first = owner.ask(Register(), [file.fileno()])
        assert isinstance(first, Registered)
        with closing(Raw(memfs.socket, hello.token)) as living:
            assert living.reply == Failed(errno.ESTALE, NO_SUCH_OWNER)
        os.kill(stat_json(memfs.path)["pid"], signal.SIGKILL)
        guessed = Token(bytes([hello.token[0] ^ 1]) + hello.token[1:])
        with closing(Raw(memfs.socket, guessed)) as stranger:
            assert stranger.reply == Failed(errno.ESTALE, NO_SUCH_OWNER)
        assert NO_SUCH_OWNER in register_as(memfs, 12001, hello.token)
        with closing(Raw(memfs.socket, hello.token)) as again:
            assert again.reply == hello
            with closing(Raw(memfs.socket, hello.token)) as second:
                assert second.reply == Failed(errno.ESTALE, NO_SUCH_OWNER)
            assert again.ask(Register(), [file.fileno()], repeats=RequestId(2)) == first
            assert again.ask(Unregister(first.file)) == Done()
            assert again.ask(Unregister(first.file)) == Failed(errno.EBADF, f"no registration {first.file}")
            said = memfs.log.read_text() + json.dumps(stat_json(memfs.path))
            memfs.process.send_signal(signal.SIGUSR1)
            said += memfs.log.read_text()
            for shown in (hello.token.hex(), repr(hello.token)[2:-1], base64.b64encode(hello.token).decode()):
                assert shown not in said


async def test_who_does_not_come_back_is_fenced_and_only_its_own_files_wait(
    mount_memfs: MountMemfs, in_memfs: Injection
) -> None:
    async with open_pair(mount_memfs, in_memfs, ",notify_timeout=2") as pair:
        pair.memfs.expected += ["owner 1 (raw) is fenced: memfs was killed, and it did not come back within 2 s"]
        gone = Raw(pair.memfs.socket)
        assert isinstance(gone.ask(Register(), [pair.private]), Registered)
        await pair.kill()
        gone.close()
        waited: list[float] = []

        def since() -> float:
            return trio.current_time() - begun

        async def punch() -> None:
            await in_thread(fallocate, pair.private, PUNCH_HOLE, 0, PAGE_SIZE)
            waited.append(since())

        async with connected(pair.memfs.socket) as owner, trio.open_nursery() as nursery:
            owned = await pair.owned(1)
            assert (owned["owner"], owned["absent"], len(owned["files"])) == (1, True, 1)
            begun = trio.current_time()
            nursery.start_soon(punch)
            await registered(owner, pair.shared)
            await in_thread(fallocate, pair.shared, PUNCH_HOLE, 0, PAGE_SIZE)
            assert not waited, "what does not concern it has waited for it"
            await registered(owner, pair.private)
            await wait_all_tasks_blocked()
            assert not pair.memfs.log.read_text().count("is cut off")
        assert waited
