"""Guest memory is filled before its guest runs, and measured; afterwards nobody gets anything in."""

from __future__ import annotations

import errno
import fcntl
import hashlib
import os
import random
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import trio

from memfs.contract.protocol.messages import Failed, Fallocate, GetPfn, Launch, Measured, Message, Populate, Unregister
from memfs.contract.units import PAGE_SIZE, ByteOffset, PageRange
from tests.helpers import pages

from .conftest import Memfs, MountMemfs, memfs_command
from .owner import Owner, connected, shell
from .test_kvmsim import RUN

IMAGE = random.Random(5).randbytes(700 * PAGE_SIZE + 5)  # more than is copied at a time, and not whole pages


def measure(*parts: tuple[int, bytes]) -> str:
    """What TDX's and SNP's way of measuring gives here: by the words of the documentation."""
    digest = hashlib.sha384()
    for first, content in parts:
        for number in range(-(-len(content) // PAGE_SIZE)):
            page = content[number * PAGE_SIZE : (number + 1) * PAGE_SIZE]
            digest.update(struct.pack("<Q", first + number) + page.ljust(PAGE_SIZE, b"\0"))
    return digest.hexdigest()


def record(*numbers: int) -> bytes:
    """Return what the documentation says is measured of an event."""
    return struct.pack("<3Q", *numbers)


def content_of(first: int, content: bytes) -> bytes:
    """Return what the documentation says is measured of whole pages."""
    parts = range(0, len(content), PAGE_SIZE)
    return b"".join(struct.pack("<Q", first + at // PAGE_SIZE) + content[at : at + PAGE_SIZE] for at in parts)


@pytest.fixture
def image(tmp_path: Path) -> Path:
    path = tmp_path / "image"
    path.write_bytes(IMAGE)
    return path


@pytest.fixture
def guest(memfs: Memfs) -> Path:
    """A guest-sealed file of 16 MiB, empty."""
    path = memfs.path / "guest"
    assert memfs.run(*memfs_command("create", "--seals", "guest", "--size", "16m", path)).returncode == 0
    return path


@contextmanager
def memfd(content: bytes, seals: int = fcntl.F_SEAL_SHRINK) -> Iterator[int]:
    fd = os.memfd_create("source", os.MFD_ALLOW_SEALING)
    try:
        os.write(fd, content)
        fcntl.fcntl(fd, fcntl.F_ADD_SEALS, seals)
        yield fd
    finally:
        os.close(fd)


async def ask(owner: Owner, path: Path, source: int, where: PageRange, flags: int = os.O_RDWR) -> Message:
    fd = await trio.to_thread.run_sync(os.open, path, flags | os.O_DIRECT)
    try:
        return await owner.ask(Populate(where, ByteOffset(0)), [fd, source])
    finally:
        await trio.to_thread.run_sync(os.close, fd)


def test_image_is_there_and_measured(memfs: Memfs, guest: Path, image: Path) -> None:
    first = memfs.run(*memfs_command("populate", guest, image))
    assert (first.stdout.strip(), first.returncode) == (measure((0, IMAGE)), 0), first.stderr
    assert guest.stat().st_blocks // 8 == 701
    with image.open("rb") as stdin:
        second = memfs.run(*memfs_command("populate", guest, "--offset", "8m"), stdin=stdin)
    assert second.stdout.strip() == measure((0, IMAGE), (2048, IMAGE))

    async def look() -> None:
        async with connected(memfs.socket) as owner:
            _, fds = await owner.registered(guest)
            assert os.pread(fds[0], 701 * PAGE_SIZE, 0) == IMAGE.ljust(701 * PAGE_SIZE, b"\0")
            assert os.pread(fds[0], len(IMAGE), 8 << 20) == IMAGE
            for fd in fds:
                os.close(fd)

    trio.run(look)


def test_not_after_the_guest_ran(memfs: Memfs, image: Path) -> None:
    """With the real kvmsim, whose first vCPU launches."""
    memfs.run("touch", "shared")
    memfs.run(*memfs_command("create", "--seals", "guest", "--size", "4m", "private"))
    assert memfs.run(*memfs_command("populate", "private", image)).returncode == 0
    ran = memfs.run(*RUN)
    assert ran.returncode == 0, ran.stdout + ran.stderr
    before = (memfs.path / "private").stat().st_blocks
    late = memfs.run(*memfs_command("populate", "private", image))
    assert late.returncode == 1
    assert late.stderr == "memfs: private: the guest has been launched\n"
    assert (memfs.path / "private").stat().st_blocks == before


@pytest.mark.parametrize("how", ["launch", "look-up"])
async def test_launched_is_for_good(memfs: Memfs, guest: Path, how: str) -> None:
    with memfd(bytes(4 * PAGE_SIZE)) as source:
        async with connected(memfs.socket) as owner:
            registered, fds = await owner.registered(guest)
            assert await ask(owner, guest, source, pages(0, 2)) == Measured(
                bytes.fromhex(measure((0, bytes(2 * PAGE_SIZE))))
            )
            assert owner.heard == [Fallocate(registered.file, pages(0, 2))]
            message = Launch(registered.file) if how == "launch" else GetPfn(registered.file, pages(9, 10), alloc=False)
            assert not isinstance(await owner.ask(message), Failed)
            for fd in fds:
                os.close(fd)
        async with connected(memfs.socket) as another:
            refused = await ask(another, guest, source, pages(2, 4))
            assert isinstance(refused, Failed)
            assert refused.errno == errno.EBUSY
    assert (await trio.to_thread.run_sync(os.stat, guest)).st_blocks == 2 * 8


async def test_measurement_of_nothing(memfs: Memfs, guest: Path) -> None:
    async with connected(memfs.socket) as owner:
        registered, fds = await owner.registered(guest)
        assert await owner.ask(Launch(registered.file)) == Measured(hashlib.sha384().digest())
        assert isinstance(await owner.ask(Launch(registered.file)), Measured)
        unknown = await owner.ask(Launch(type(registered.file)(99)))
        assert isinstance(unknown, Failed)
        assert unknown.errno == errno.EBADF
        for fd in fds:
            os.close(fd)


REMOVALS = {
    "punched": (["fallocate", "-p", "-o", "4K", "-l", "8K"], (1, 3)),
    "punched and allocated again": (["sh", "-c", 'fallocate -p -l 4K "$0" && fallocate -l 4K "$0"'], (0, 1)),
    "truncated to nothing and grown again": (["sh", "-c", ': > "$0"; truncate -s 16M "$0"'], (0, 4096)),
    "truncated": (["truncate", "-s", "8K"], (2, 4096)),
    "more than was populated": (["fallocate", "-p", "-l", "1M"], (0, 256)),
}


@pytest.mark.parametrize("how", REMOVALS)
async def test_measured_pages_that_are_removed_before_the_launch_show(memfs: Memfs, guest: Path, how: str) -> None:
    command, (start, end) = REMOVALS[how]
    content = random.Random(7).randbytes(4 * PAGE_SIZE)
    with memfd(content) as source:
        async with connected(memfs.socket) as loader:
            await ask(loader, guest, source, pages(0, 4))
        assert (await shell(*command, guest, cwd=memfs.path)).returncode == 0
        async with connected(memfs.socket) as owner:
            registered, fds = await owner.registered(guest)
            measured = await owner.ask(Launch(registered.file))
            for fd in fds:
                os.close(fd)
    expected = hashlib.sha384(content_of(0, content) + record(2**64 - 1, start, end)).digest()
    assert measured == Measured(expected)


@pytest.mark.parametrize(
    "command",
    [
        ["fallocate", "-p", "-o", "1M", "-l", "1M"],
        ["truncate", "-s", "8M"],
        ["truncate", "-s", "32M"],
        ["fallocate", "-l", "2M"],
    ],
)
async def test_what_removes_no_page_leaves_the_measurement(memfs: Memfs, guest: Path, command: list[str]) -> None:
    with memfd(bytes(PAGE_SIZE)) as source:
        async with connected(memfs.socket) as owner:
            registered, fds = await owner.registered(guest)
            before = await ask(owner, guest, source, pages(0, 1))
            assert (await shell(*command, guest, cwd=memfs.path)).returncode == 0
            assert await owner.ask(Launch(registered.file)) == before
            # From then on the guest converts memory as it likes.
            assert (await shell("fallocate", "-p", "-l", "4K", guest, cwd=memfs.path)).returncode == 0
            assert await owner.ask(Launch(registered.file)) == before
            for fd in fds:
                os.close(fd)


@pytest.mark.parametrize("when", ["before", "between", "after the launch"])
@pytest.mark.parametrize("how", ["unregistered", "disconnected"])
async def test_a_former_owner_shows_in_the_measurement(memfs: Memfs, guest: Path, when: str, how: str) -> None:
    """It had a descriptor of the memory that others take for what was populated, or for zeros."""

    async def come_and_go(*, launch: bool = False) -> None:
        async with connected(memfs.socket) as former:
            registered, fds = await former.registered(guest)
            os.pwrite(fds[0], b"unmeasured", 2 * PAGE_SIZE)
            for fd in fds:
                os.close(fd)
            if launch:
                await former.ask(Launch(registered.file))
            if how == "unregistered":
                assert not isinstance(await former.ask(Unregister(registered.file)), Failed)

    content = random.Random(8).randbytes(2 * PAGE_SIZE)
    assert (await shell("fallocate", "-o", "8K", "-l", "4K", guest, cwd=memfs.path)).returncode == 0
    if when == "before":
        await come_and_go()
    with memfd(content) as source:
        async with connected(memfs.socket) as loader:
            await ask(loader, guest, source, pages(0, 2))
    if when != "before":
        await come_and_go(launch=when == "after the launch")
    async with connected(memfs.socket) as owner:
        registered, fds = await owner.registered(guest)
        measured = await owner.ask(Launch(registered.file))
        for fd in fds:
            os.close(fd)
    records = [content_of(0, content), record(2**64 - 2, 0, 0)]
    assert measured == Measured(hashlib.sha384(b"".join(records[::-1] if when == "before" else records)).digest())


REFUSED: dict[str, tuple[int, dict[str, Any]]] = {
    "past the end": (errno.EINVAL, {"where": pages(4095, 4097)}),
    "descriptor only to read": (errno.EACCES, {"flags": os.O_RDONLY}),
    "source too short": (errno.EINVAL, {"content": bytes(PAGE_SIZE + 5)}),
    "source may shrink": (errno.EINVAL, {"seals": fcntl.F_SEAL_GROW}),
    "no room": (errno.ENOSPC, {"where": pages(0, 3000)}),
}


@pytest.mark.parametrize("name", REFUSED)
async def test_refusal_changes_nothing(mount_memfs: MountMemfs, name: str) -> None:
    expected, changes = REFUSED[name]
    where: PageRange = changes.get("where", pages(0, 2))
    memfs = await trio.to_thread.run_sync(mount_memfs, "size=8m")
    guest = memfs.path / "guest"
    await trio.run_process(memfs_command("create", "--seals", "guest", "--size", "16m", guest))
    with memfd(changes.get("content", b"x" * 3000 * PAGE_SIZE), changes.get("seals", fcntl.F_SEAL_SHRINK)) as source:
        async with connected(memfs.socket) as owner:
            refused = await ask(owner, guest, source, where, changes.get("flags", os.O_RDWR))
            assert isinstance(refused, Failed)
            assert refused.errno == expected
            assert (await trio.to_thread.run_sync(os.stat, guest)).st_blocks == 0
            # Nothing of it is measured either.
            with memfd(b"y" * PAGE_SIZE) as right:
                measured = await ask(owner, guest, right, pages(7, 8))
            assert measured == Measured(bytes.fromhex(measure((7, b"y" * PAGE_SIZE))))


async def test_only_guest_memory_from_only_a_memfd(memfs: Memfs, guest: Path, image: Path, tmp_path: Path) -> None:
    ordinary = memfs.path / "ordinary"
    await trio.run_process(["truncate", "--size", "1m", str(ordinary)])
    async with connected(memfs.socket) as owner:
        with memfd(b"x" * PAGE_SIZE) as source:
            refused = await ask(owner, ordinary, source, pages(0, 1))
            assert isinstance(refused, Failed)
            assert refused.errno == errno.EINVAL
        pipe = os.pipe()
        others = [os.open(image, os.O_RDONLY), *pipe, await trio.to_thread.run_sync(os.open, ordinary, os.O_RDONLY)]
        for fd in others:  # a file that might make the daemon wait, the worst of them one of its own
            refused = await ask(owner, guest, fd, pages(0, 1))
            assert isinstance(refused, Failed)
            assert refused.errno == errno.EINVAL
            await trio.to_thread.run_sync(os.close, fd)
    assert (await trio.to_thread.run_sync(os.stat, guest)).st_blocks == 0


@pytest.mark.parametrize("command", ["create", "allocate", "populate"])
def test_what_is_not_a_size_is_wrong_usage(memfs: Memfs, command: str) -> None:
    option = "--size" if command == "create" else "--offset"
    result = memfs.run(*memfs_command(command, "file", option, "much"))
    assert result.returncode == 2
    assert "much: not a size" in result.stderr
    assert list(memfs.path.iterdir()) == []


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("populate", "guest", "/nonexistent"), "/nonexistent: No such file"),
        (("populate", "guest", "/dev/null", "--offset", "5"), "multiple of 4096"),
        (("populate", "missing", "/dev/null"), "missing: No such file"),
        (("allocate", "missing"), "missing: No such file"),
        (("allocate", "empty"), "empty"),
    ],
)
def test_wrong_use_is_said(memfs: Memfs, guest: Path, arguments: tuple[str, ...], words: str) -> None:
    (memfs.path / "empty").touch()
    result = memfs.run(*memfs_command(*arguments))
    assert result.returncode == 1
    assert words in result.stderr
    assert guest.stat().st_blocks == 0


def test_allocate(memfs: Memfs, guest: Path) -> None:
    assert memfs.run(*memfs_command("allocate", guest, "--offset", "4m", "--length", "1m")).returncode == 0
    assert guest.stat().st_blocks * 512 == 1 << 20
    assert memfs.run(*memfs_command("allocate", guest)).returncode == 0
    assert guest.stat().st_blocks * 512 == 16 << 20
    created = memfs.run(*memfs_command("create", "--seals", "guest", "--size", "2m", "--allocate", "another"))
    assert (created.returncode, (memfs.path / "another").stat().st_blocks * 512) == (0, 2 << 20)
    full = memfs.run(*memfs_command("create", "--size", "1g", "--allocate", "large"))
    assert (full.returncode, (memfs.path / "large").exists()) == (1, False)
    assert "No space left" in full.stderr
