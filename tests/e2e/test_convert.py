"""MEMFS_IOC_CONVERT and `memfs convert` on a mount: who may, what each refusal says, and what an owner hears."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import mmap
import os
import signal
import struct
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import trio

from kvmsim.vmm import by_fallocate
from memfs.contract.conversion import MEMFS_IOC_CONVERT, MEMFS_IOC_GET_KEY, Key, convert, key_of
from memfs.contract.page_ranges import PageRanges
from memfs.contract.protocol.messages import (
    NO_FILE,
    AllowPreserve,
    ConvertBegin,
    ConvertEnd,
    Done,
    Registered,
)
from memfs.contract.sys.libc import PUNCH_HOLE, fallocate
from memfs.contract.units import PAGE_SIZE, PageRange
from tests.helpers import one, pages, raises

from .conftest import Memfs, MountMemfs, memfs_command, run, state_of
from .owner import connected

PAGES = 64  # of each file
WAYS = ["size=64m", "size=64m,backing=memfd", "size=64m,passthrough=off"]


@dataclass
class Pair:
    """A shared and a private file on a mount, open."""

    memfs: Memfs
    shared: Path
    private: Path
    shared_fd: int
    private_fd: int
    key: Key

    @classmethod
    @contextlib.contextmanager
    def on(cls, memfs: Memfs, name: str = "vm") -> Iterator[Pair]:
        shared, private = memfs.path / f"{name}.shared", memfs.path / f"{name}.private"
        for path in (shared, private):
            os.mknod(path, 0o666)
        os.setxattr(private, "user.memfs.seals", b"guest")
        for path in (shared, private):
            os.truncate(path, PAGES * PAGE_SIZE)
        fds = [os.open(path, os.O_RDWR) for path in (shared, private)]
        try:
            yield cls(memfs, shared, private, fds[0], fds[1], key_of(fds[0]))
        finally:
            for fd in fds:
                os.close(fd)

    def convert(self, *ranges: PageRange, to_private: bool) -> None:
        """Convert as the VMM does."""
        try:
            convert(self.private_fd, self.key, ranges, to_private=to_private)
        except OSError as error:
            if error.errno != errno.EOPNOTSUPP:
                raise
            assert not self.passes_through
            by_files = by_fallocate.to_private if to_private else by_fallocate.to_shared
            by_files(self.shared_fd, self.private_fd, ranges)

    @property
    def passes_through(self) -> bool:
        return bool(state_of(self.memfs.path)["passthrough"])

    @property
    def state(self) -> tuple[object, ...]:
        """Which pages are private, how many are used, and what the host reads."""
        extents, position, size = [], 0, PAGES * PAGE_SIZE
        with contextlib.suppress(OSError):
            while position < size:
                start = os.lseek(self.private_fd, position, os.SEEK_DATA)
                position = os.lseek(self.private_fd, start, os.SEEK_HOLE)
                extents.append((start // PAGE_SIZE, position // PAGE_SIZE))
        space = os.statvfs(self.memfs.path)
        blocks = [os.stat(path).st_blocks // 8 for path in (self.shared, self.private)]
        return extents, *blocks, space.f_blocks - space.f_bfree, os.pread(self.shared_fd, size, 0)


@pytest.fixture
def pair(memfs: Memfs) -> Iterator[Pair]:
    with Pair.on(memfs) as pair:
        os.pwrite(pair.shared_fd, b"x" * 8 * PAGE_SIZE, 0)
        yield pair


# -- the call ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mount", WAYS)
def test_there_and_back(mount_memfs: MountMemfs, mount: str) -> None:
    """What stat(2) and reads say changes with the call, whatever the kernel may have cached of both files."""
    memfs = mount_memfs(mount)
    with Pair.on(memfs) as pair:
        os.pwrite(pair.shared_fd, b"x" * 8 * PAGE_SIZE, 0)
        pair.convert(pages(1, 3), one(5), to_private=True)
        extents, shared, private, used, content = pair.state
        assert (extents, shared, private, used) == ([(1, 3), (5, 6)], 5, 3, 8)
        assert isinstance(content, bytes)
        assert content.count(b"x") == 5 * PAGE_SIZE
        pair.convert(pages(0, PAGES), to_private=False)
        assert pair.state == ([], 8, 0, 8, content)


@pytest.mark.parametrize("mount", WAYS)
def test_what_a_mapping_holds_goes_as_well(mount_memfs: MountMemfs, mount: str) -> None:
    """Where mappings are of the page cache, what is dirty there must not come back when it is written."""
    memfs = mount_memfs(mount)
    with Pair.on(memfs) as pair, mmap.mmap(pair.shared_fd, PAGES * PAGE_SIZE) as memory:
        memory[: 8 * PAGE_SIZE] = b"x" * 8 * PAGE_SIZE
        pair.convert(pages(0, 4), to_private=True)
        memory.flush()
        pair.convert(pages(0, 4), to_private=True)  # nothing to do
        assert pair.state[:4] == ([(0, 4)], 4, 4, 8)
        assert memory[: 8 * PAGE_SIZE] == bytes(4 * PAGE_SIZE) + b"x" * 4 * PAGE_SIZE
        assert os.pread(pair.shared_fd, 8 * PAGE_SIZE, 0) == memory[: 8 * PAGE_SIZE]


@pytest.mark.parametrize("way", ["", ",passthrough=off", ",backing=memfd"])
def test_whole_limit_changes_sides(mount_memfs: MountMemfs, way: str) -> None:
    memfs = mount_memfs(f"size={PAGES * PAGE_SIZE}{way}")
    with Pair.on(memfs) as pair:
        os.pwrite(pair.shared_fd, b"x" * PAGES * PAGE_SIZE, 0)
        for to_private in (True, False, True):
            pair.convert(pages(0, PAGES), to_private=to_private)
            assert pair.state[1:4] == ((0, PAGES, PAGES) if to_private else (PAGES, 0, PAGES))
        (memfs.path / "one more").touch()
        with raises(errno.ENOSPC):
            (memfs.path / "one more").write_bytes(b"x")
        fallocate(pair.private_fd, PUNCH_HOLE, 0, PAGE_SIZE)
        (memfs.path / "one more").write_bytes(b"x")
        before = pair.state
        with raises(errno.ENOSPC):
            pair.convert(pages(0, 2), to_private=True)
        assert pair.state == before


@pytest.mark.parametrize("way", ["passthrough=off", "backing=memfd"])
def test_refused_where_the_page_cache_lies_between(mount_memfs: MountMemfs, way: str) -> None:
    """It changes nothing, neither here nor there; and the command says what to do."""
    with Pair.on(mount_memfs(f"size=64m,{way}")) as pair, mmap.mmap(pair.shared_fd, PAGES * PAGE_SIZE) as memory:
        fallocate(pair.private_fd, 0, 8 * PAGE_SIZE, PAGE_SIZE)
        memory[: 4 * PAGE_SIZE] = b"x" * 4 * PAGE_SIZE
        before = pair.state
        for to_private in (True, False):
            with raises(errno.EOPNOTSUPP):
                convert(pair.private_fd, pair.key, [pages(0, PAGES)], to_private=to_private)
        assert pair.state == before
        assert memory[: 4 * PAGE_SIZE] == b"x" * 4 * PAGE_SIZE
        refused = run(*memfs_command("convert", "--to", "private", pair.shared, pair.private, "0:4k"))
        assert (refused.returncode, "fallocate" in refused.stderr) == (1, True), refused.stderr
        assert (pair.state[0], pair.state[-1]) == (before[0], before[-1])


STORER = """
import mmap, os, sys
from memfs.contract.conversion import convert, key_of
from memfs.contract.units import PageIndex, PageRange
shared, private = (os.open(path, os.O_RDWR) for path in sys.argv[1:])
key, size = key_of(shared), os.fstat(private).st_size
memory = mmap.mmap(shared, size)
for at in range(0, size, 4096):
    memory[at] = 1
print("ready", flush=True)
try:
    convert(private, key, [PageRange(PageIndex(0), PageIndex(size // 4096))], to_private=True)
except OSError as error:
    print(error.errno, flush=True)
sys.stdin.read()
"""


@pytest.mark.parametrize("way", ["passthrough=off", "backing=memfd"])
def test_death_while_pages_are_dirty_is_told_to_everybody(mount_memfs: MountMemfs, tmp_path: Path, way: str) -> None:
    """No thread of the daemon waits for what only the daemon can write, and keeps the mount alive by that."""
    memfs = mount_memfs(f"size=128m,{way}")
    mount = (*memfs_command("mount", memfs.path, "--socket", tmp_path / "again"), "-o", "size=64m")
    with Pair.on(memfs) as pair:
        paths = (pair.shared, pair.private)
        for path in paths:
            os.truncate(path, 48 << 20)
    storer = subprocess.Popen(
        [sys.executable, "-c", STORER, *paths],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        cwd=Path(__file__).parents[2],
    )
    try:
        assert storer.stdout is not None
        assert storer.stdout.readline() == "ready\n"
        time.sleep(0.2)  # in the middle, if there were one
        memfs.process.kill()
        asking = subprocess.Popen(["stat", "--file-system", memfs.path], stderr=subprocess.DEVNULL)
        assert asking.wait(10) == 1
        assert int(storer.stdout.readline()) in (errno.EOPNOTSUPP, errno.ENOTCONN, errno.ECONNABORTED)
        assert run(*mount).returncode == 0
        assert run("umount", memfs.path).returncode == 0
    finally:
        run("umount", "--force", memfs.path)  # ends it, whatever waits
        storer.kill()
        storer.communicate()


def test_key_is_as_good_as_the_descriptor(pair: Pair) -> None:
    """And no better: it needs one that is open for writing, and ends with it. Others' guesses are worth nothing."""
    before = pair.state
    reader = os.open(pair.shared, os.O_RDONLY)
    with raises(errno.EBADF):
        key_of(reader)
    os.close(reader)
    private_reader = os.open(pair.private, os.O_RDONLY)
    with raises(errno.EBADF):
        convert(private_reader, pair.key, [one(0)], to_private=True)
    os.close(private_reader)
    other = os.open(pair.shared, os.O_RDWR)
    key = key_of(other)
    assert key not in (pair.key, 0)
    assert key == key_of(other)
    copy = os.dup(other)
    os.close(other)
    convert(pair.private_fd, key, [one(20)], to_private=False)  # nothing to do
    os.close(copy)
    os.stat(pair.shared)  # close(2) does not wait until memfs has heard of it, but what follows comes later
    with raises(errno.EBADF):
        convert(pair.private_fd, key, [one(0)], to_private=False)
    for guess in (0, 1, 2, 3, pair.key ^ 1, (1 << 64) - 1):
        with raises(errno.EBADF):
            convert(pair.private_fd, Key(guess), [one(0)], to_private=True)
    assert pair.state == before


def test_files_of_others(mount_memfs: MountMemfs) -> None:
    """The key of a file of another mount names nothing here; and files that are no pair are refused."""
    memfs, elsewhere = mount_memfs("size=64m"), mount_memfs("size=64m")
    with Pair.on(memfs) as pair, Pair.on(elsewhere) as other:
        before = pair.state
        with raises(errno.EBADF):
            convert(pair.private_fd, other.key, [one(0)], to_private=True)
        private_key = key_of(pair.private_fd)
        for private, key in (
            (pair.private_fd, private_key),
            (pair.shared_fd, pair.key),
            (pair.shared_fd, private_key),
        ):
            with raises(errno.EINVAL):
                convert(private, key, [one(0)], to_private=True)
        assert pair.state == before


def test_arguments_that_are_none(pair: Pair) -> None:
    """The kernel copies as many bytes as the command's number says, whatever is in them."""
    before = pair.state
    good = struct.pack("=5Q", pair.key, 8, 0, 0, PAGE_SIZE)
    for argument in (
        struct.pack("=5Q", pair.key, 8, 0, 0, 0),
        struct.pack("=5Q", pair.key, 8, 0, 1, PAGE_SIZE),
        struct.pack("=5Q", pair.key, 8, 0, 0, PAGE_SIZE + 1),
        struct.pack("=5Q", pair.key, 1, 0, 0, PAGE_SIZE),
        struct.pack("=5Q", pair.key, 8, 4, 0, PAGE_SIZE),
        struct.pack("=5Q", pair.key, 8, 0, PAGES * PAGE_SIZE, PAGE_SIZE),
        struct.pack("=5Q", pair.key, 8, 0, 0, (PAGES + 1) * PAGE_SIZE),
        struct.pack("=5Q", pair.key, 8, 0, 1 << 63, PAGE_SIZE),
        struct.pack("=5Q", pair.key, 8, 0, PAGE_SIZE, (1 << 64) - PAGE_SIZE),
        struct.pack("=7Q", pair.key, 8, 0, 0, 2 * PAGE_SIZE, PAGE_SIZE, PAGE_SIZE),
        good[:-1],
        good[:24],
        good + bytes(8),
        good[:24] + b"".join(struct.pack("=2Q", 2 * at * PAGE_SIZE, PAGE_SIZE) for at in range(513)),
    ):
        command = MEMFS_IOC_CONVERT(1) & ~(0x3FFF << 16) | len(argument) << 16
        with raises(errno.EINVAL):
            fcntl.ioctl(pair.private_fd, command, bytearray(argument))
        assert pair.state == before
    with raises(errno.ENOTTY):
        fcntl.ioctl(pair.shared_fd, MEMFS_IOC_GET_KEY & ~(0x3FFF << 16), 0)
    fcntl.ioctl(pair.private_fd, MEMFS_IOC_CONVERT(1), bytearray(good))
    assert pair.state != before


def test_seals_and_inode_flags(pair: Pair) -> None:
    """As fallocate(2) and a punch of either file."""
    pair.convert(one(0), to_private=True)
    for path, flag, refused in (
        (pair.private, "+i", (True, False)),
        (pair.shared, "+i", (True, False)),
        (pair.shared, "+a", (True,)),
        (pair.private, "+a", (False,)),
    ):
        assert run("chattr", flag, path).returncode == 0
        before = pair.state
        for to_private in refused:
            with raises(errno.EPERM):
                pair.convert(one(0), one(1), to_private=to_private)
        assert pair.state == before
        assert run("chattr", flag.replace("+", "-"), path).returncode == 0


# -- owners --------------------------------------------------------------------------------------------------------


def asked(pair: Pair, *ranges: PageRange, to_private: bool) -> subprocess.Popen[bytes]:
    """Convert in another process."""
    parts = [f"{each.offset}:{each.nbytes}" for each in ranges]
    to = "private" if to_private else "shared"
    return subprocess.Popen(
        memfs_command("convert", "--to", to, pair.shared, pair.private, *parts), stderr=subprocess.PIPE
    )


@contextlib.asynccontextmanager
async def open_pair(memfs: Memfs) -> AsyncIterator[Pair]:
    """A pair, opened and closed in a thread: an owner's thread must not wait for memfs."""
    stack = contextlib.ExitStack()
    pair = await trio.to_thread.run_sync(stack.enter_context, Pair.on(memfs))
    try:
        yield pair
    finally:
        with trio.CancelScope(shield=True):
            await trio.to_thread.run_sync(stack.close)


async def ended(process: subprocess.Popen[bytes]) -> tuple[int, bytes]:
    _, stderr = await trio.to_thread.run_sync(process.communicate)
    return process.returncode, stderr


@pytest.mark.parametrize("own", ["both", "shared", "private"])
async def test_owner_hears_two_messages(memfs: Memfs, own: str) -> None:
    """Whichever of the files it has; pages are what they were until it has acknowledged."""
    async with open_pair(memfs) as pair, connected(memfs.socket) as owner:
        ids = {pair.shared: NO_FILE, pair.private: NO_FILE}
        for path in ids:
            if own in ("both", path.suffix[1:]):
                registered = await owner.register(path)
                assert isinstance(registered, Registered)
                ids[path] = registered.file
        owner.acknowledge = trio.Event()
        ranges = PageRanges.of([one(2), pages(8, 12)])
        process = asked(pair, *ranges, to_private=True)
        with trio.fail_after(10):
            await owner.arrived.wait()
            before = await trio.to_thread.run_sync(lambda: os.stat(pair.private).st_blocks)
            owner.acknowledge.set()
            assert await ended(process) == (0, b"")
            assert await ended(asked(pair, *ranges, to_private=True)) == (0, b"")  # nothing to do
            while len(owner.heard) < 2:  # noqa: ASYNC110
                await trio.sleep(0.001)
        assert before == 0
        begin, end = owner.heard
        assert begin == ConvertBegin(ids[pair.shared], ids[pair.private], True, ranges)
        assert end == ConvertEnd(ids[pair.shared], ids[pair.private], True, ranges)


async def test_other_owners(memfs: Memfs) -> None:
    """Two owners are no pair; a slow one is fenced."""
    memfs.expected += ["is fenced"]
    async with open_pair(memfs) as pair:
        before = await trio.to_thread.run_sync(lambda: pair.state)
        async with connected(memfs.socket) as one_owner, connected(memfs.socket) as other:
            await one_owner.register(pair.shared)
            await other.register(pair.private)
            code, said = await ended(asked(pair, one(0), to_private=True))
            assert (code, b"Operation not permitted" in said) == (1, True), said
            assert not one_owner.heard
            assert not other.heard
        assert await trio.to_thread.run_sync(lambda: pair.state) == before
        async with connected(memfs.socket) as owner:
            await owner.register(pair.private)
            owner.acknowledge = trio.Event()
            with trio.fail_after(20):
                assert await ended(asked(pair, one(0), to_private=True)) == (0, b"")
                await owner.gone.wait()


async def test_owner_that_dies_meanwhile(memfs: Memfs) -> None:
    async with open_pair(memfs) as pair:
        async with connected(memfs.socket) as owner:
            await owner.register(pair.shared)
            await owner.register(pair.private)
            owner.acknowledge = trio.Event()
            process = asked(pair, pages(0, 4), to_private=True)
            with trio.fail_after(10):
                await owner.arrived.wait()
            owner.client.close()
        with trio.fail_after(10):
            assert await ended(process) == (0, b"")
        state = await trio.to_thread.run_sync(lambda: pair.state)
        assert state[:4] == ([(0, 4)], 0, 4, 4)


async def test_content_is_kept_where_the_owner_said_so(memfs: Memfs) -> None:
    async with open_pair(memfs) as pair, connected(memfs.socket) as owner:

        async def preserve(to: str) -> tuple[int, str]:
            command = memfs_command("convert", "--preserve", "--to", to, pair.shared, pair.private, "0:16k")
            done = await trio.to_thread.run_sync(lambda: run(*command))
            return done.returncode, done.stderr

        async def content() -> bytes:
            return await trio.to_thread.run_sync(os.pread, pair.shared_fd, PAGE_SIZE, PAGE_SIZE)

        await trio.to_thread.run_sync(os.pwrite, pair.shared_fd, b"x" * PAGE_SIZE, PAGE_SIZE)
        registered = await owner.register(pair.private)
        assert isinstance(registered, Registered)
        code, said = await preserve("private")
        assert (code, "Operation not permitted: " in said, "--preserve needs a VM that owns" in said) == (1, True, True)
        assert await owner.ask(AllowPreserve(registered.file)) == Done()
        code, said = await preserve("private")
        assert (code, "busy" in said) == (1, True), said
        await owner.client.launch(registered.file)
        assert await preserve("private") == (0, "")
        assert await content() == bytes(PAGE_SIZE)
        assert await preserve("shared") == (0, "")
        assert await content() == b"x" * PAGE_SIZE
        await owner.client.unregister(registered.file)
        assert (await preserve("private"))[0] == 1, "it was the owner who allowed it"


CALLER = """
import os, sys
from memfs.contract.conversion import convert, key_of
from memfs.contract.units import PageIndex, PageRange
shared, private = (os.open(path, os.O_RDWR) for path in sys.argv[1:])
key = key_of(shared)
print("ready", flush=True)
size = os.fstat(private).st_size // 4096
try:
    while True:
        for to_private in (True, False):
            convert(private, key, [PageRange(PageIndex(0), PageIndex(size))], to_private=to_private)
except KeyboardInterrupt:
    print("interrupted", flush=True)
"""


def test_signals(mount_memfs: MountMemfs) -> None:
    """A caller that is interrupted at any moment leaves each page on one side, or on none that was on none."""
    memfs = mount_memfs("size=3g")
    with Pair.on(memfs) as pair:
        for path in (pair.shared, pair.private):
            os.truncate(path, 1 << 30)
        for number in range(4):
            process = subprocess.Popen(
                [sys.executable, "-c", CALLER, pair.shared, pair.private],
                stdout=subprocess.PIPE,
                text=True,
                cwd=Path(__file__).parents[2],
                preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
            )
            assert process.stdout is not None
            assert process.stdout.readline() == "ready\n"
            time.sleep(0.03 * (number + 1))  # anywhere in it
            process.send_signal(signal.SIGINT)
            assert process.communicate(timeout=30)[0] == "interrupted\n"
            shared, private = (os.stat(path).st_blocks // 8 for path in (pair.shared, pair.private))
            assert shared + private in (0, *(count << 16 for count in range(1, 5)))
            assert not private % (1 << 16), "a chunk in part"
        space = os.statvfs(memfs.path)
        assert space.f_blocks - space.f_bfree == shared + private


# -- the command ---------------------------------------------------------------------------------------------------


def test_command(pair: Pair) -> None:
    memfs = pair.memfs

    def command(*arguments: str | Path) -> tuple[int, str]:
        done = run(*memfs_command("convert", *arguments))
        return done.returncode, done.stderr

    assert command("--to", "private", pair.shared, pair.private, "4k:8k", "32k:4k") == (0, "")
    assert pair.state[:3] == ([(1, 3), (8, 9)], 6, 3)
    assert command("--to", "shared", pair.shared, pair.private, "0:256k") == (0, "")
    assert pair.state[:3] == ([], 9, 0)
    many = [f"{8 * at}k:4k" for at in range(600)]
    for path in (pair.shared, pair.private):
        os.truncate(path, 8 << 20)
    assert command("--to", "private", pair.shared, pair.private, *many) == (0, "")
    assert os.stat(pair.private).st_blocks // 8 == 600
    before = pair.state
    (memfs.path / "other").touch()
    for arguments, said in (
        (("private", pair.shared, pair.private, "4k"), "not OFFSET:LENGTH"),
        (("private", pair.shared, pair.private, "4k:0"), "not whole pages"),
        (("private", pair.shared, pair.private, "1:4k"), "not whole pages"),
        (("private", pair.shared, pair.private, "x:4k"), "not a size"),
        (("private", pair.shared, pair.private, "0:8k", "4k:4k"), "overlap"),
        (("private", pair.shared, pair.private, "8m:4k"), "ends before byte"),
        (("private", pair.private, pair.shared, "0:4k"), "guest-sealed"),
        (("private", pair.shared, memfs.path / "other", "0:4k"), "not guest-sealed"),
        (("private", pair.shared, pair.private), "required"),
        (("both", pair.shared, pair.private, "0:4k"), "invalid choice"),
        (("private", pair.shared, "/etc/passwd", "0:4k"), "does not lie on a memfs"),
    ):
        code, stderr = command("--to", *arguments)
        assert code in (1, 2), arguments
        assert said in stderr, (arguments, stderr)
        assert "Traceback" not in stderr
    assert pair.state == before
