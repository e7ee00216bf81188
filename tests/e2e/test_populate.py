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

from memfs.contract.protocol.messages import Failed, Fallocate, GetPfn, Launch, Measured, Message, Populate
from memfs.contract.units import PAGE_SIZE, ByteOffset, PageRange
from tests.helpers import pages

from .conftest import Memfs, MountMemfs, memfs_command
from .owner import Owner, connected
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
    assert late.stderr == "memfs: populate: the guest has been launched\n"
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
