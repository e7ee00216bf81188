"""Operations on much memory: others are answered meanwhile, a signal ends them, and then nothing is left of them."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from pathlib import Path

import pytest
import trio

from memfs.contract.protocol.messages import Fallocate, InvalidateBegin, InvalidateEnd
from memfs.contract.units import PageIndex, PageRange

from .conftest import Memfs, MountMemfs, interruptible
from .owner import connected, shell

SIZE = "1g"
FULL = 1 << 18  # pages
TRIES = 20  # the memory may be there before we can send a signal


@pytest.fixture(params=["", ",backing=memfd"], ids=["tmpfs", "memfd"])
def large(request: pytest.FixtureRequest, mount_memfs: MountMemfs) -> Memfs:
    return mount_memfs(f"size=1100m{request.param}")


def used(path: Path) -> int:
    status = os.statvfs(path)
    return status.f_blocks - status.f_bfree


def settled(path: Path) -> int:
    """Pages in use once that does not change any more: who is killed does not wait for the answer."""
    before, now = -1, used(path)
    while before != now:
        time.sleep(0.3)  # longer than a piece takes
        before, now = now, used(path)
    return now


@pytest.mark.parametrize("guest", [False, True], ids=["ordinary", "guest"])
def test_room_of_a_large_file_is_there_when_it_is_removed(large: Memfs, guest: bool) -> None:
    """It is freed beside everything else; who needs the room does not get ENOSPC meanwhile."""
    if guest:
        os.setxattr(large.path, "user.memfs.default_seals", b"guest")
    for name, length in [("first", "1098m"), ("small", "4m"), ("second", "1098m"), ("third", "1098m")]:
        (large.path / name).touch()
        subprocess.run(["fallocate", "--length", length, name], cwd=large.path, check=True)
        (large.path / name).unlink()
    assert settled(large.path) == 0


@pytest.mark.parametrize("flags", [os.O_CREAT, os.O_TRUNC, 0], ids=["create", "truncate", "open"])
def test_who_opens_a_file_to_write_finds_the_room_of_a_large_one(large: Memfs, flags: int) -> None:
    """What passes through never asks memfs for room, so it is there when the file is open."""
    other = large.path / "other"
    if not flags & os.O_CREAT:
        other.write_bytes(b"x")
    for _ in range(3):
        subprocess.run(["fallocate", "--length", "1098m", "file"], cwd=large.path, check=True)
        time.sleep(0.1)  # the kernel releases what was closed a bit later
        (large.path / "file").unlink()
        fd = os.open(other, os.O_WRONLY | flags)
        assert os.write(fd, bytes(8 << 20)) == 8 << 20
        os.ftruncate(fd, 4096)
        os.close(fd)
        if flags & os.O_CREAT:
            other.unlink()


def test_df_does_not_see_a_large_file_that_is_removed(large: Memfs) -> None:
    for _ in range(3):
        subprocess.run(["fallocate", "--length", SIZE, "file"], cwd=large.path, check=True)
        assert used(large.path) == FULL
        time.sleep(0.1)
        (large.path / "file").unlink()
        assert used(large.path) == 0


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL])
@pytest.mark.parametrize("guest", [False, True], ids=["ordinary", "guest"])
def test_a_signal_ends_it_and_what_there_is_is_accounted_for(large: Memfs, guest: bool, number: signal.Signals) -> None:
    if guest:
        os.setxattr(large.path, "user.memfs.default_seals", b"guest")
    for attempt in range(TRIES):
        path = large.path / f"file-{attempt}"
        path.touch()
        process = subprocess.Popen(["fallocate", "--length", SIZE, path.name], cwd=large.path, preexec_fn=interruptible)
        time.sleep(0.01 * (attempt % 10 + 1))
        process.send_signal(number)
        if process.wait() == -number and settled(large.path) < FULL:
            assert path.stat().st_blocks // 8 == used(large.path)
            assert path.stat().st_size // 4096 == used(large.path)  # as far as it got: who goes on can see where
            subprocess.run(["fallocate", "--length", SIZE, path.name], cwd=large.path, check=True)
            assert used(large.path) == FULL
            return
        os.unlink(path)
    pytest.fail("the signal always came too late")


def test_without_room_nothing_is_allocated(large: Memfs) -> None:
    """As much as would be done in pieces, of which the last do not fit."""
    (large.path / "other").write_bytes(b"x" * (200 << 20))
    before = used(large.path)
    for seals in (b"", b"guest"):
        os.setxattr(large.path, "user.memfs.default_seals", seals)
        result = large.run("fallocate", "--length", SIZE, "file")
        assert "No space left" in result.stderr
        assert (used(large.path), (large.path / "file").stat().st_size) == (before, 0)
        os.unlink(large.path / "file")


def test_others_are_answered_meanwhile(large: Memfs) -> None:
    (large.path / "small").write_bytes(b"x")
    answered = 0
    process = subprocess.Popen(["fallocate", "--length", SIZE, "file"], cwd=large.path)
    while process.poll() is None:
        assert os.stat(large.path / "small").st_size == 1  # asks the daemon: a file with content may change
        answered += 1
    assert process.returncode == 0
    assert answered > 5
    answered = 0
    process = subprocess.Popen(["fallocate", "--punch-hole", "--length", SIZE, "file"], cwd=large.path)
    while process.poll() is None:
        os.stat(large.path / "small")
        answered += 1
    assert process.returncode == 0
    assert answered > 5
    assert (large.path / "file").stat().st_blocks == 0
    os.truncate(large.path / "file", 0)


async def test_a_tebibyte_of_holes_costs_nothing(memfs: Memfs) -> None:
    """One notification for all of it, and no memory of the daemon's."""
    pages = PageRange(PageIndex(0), PageIndex(1 << 28))
    for command in ("memfs.default_seals", None):
        if command:
            await trio.to_thread.run_sync(os.setxattr, memfs.path, f"user.{command}", b"guest")
        name = "guest" if command else "file"
        await shell("truncate", "--size", "1T", name, cwd=memfs.path)
        await shell("fallocate", "--offset", "512G", "--length", "4096", name, cwd=memfs.path)
        async with connected(memfs.socket) as owner:
            await owner.register(memfs.path / name)
            result = await shell("fallocate", "--punch-hole", "--length", "1T", name, cwd=memfs.path)
            assert result.returncode == 0, result.stderr
            assert [type(message) for message in owner.heard] == [InvalidateBegin, InvalidateEnd]
            assert all(not isinstance(m, Fallocate) and getattr(m, "pages", None) == pages for m in owner.heard)
    assert await trio.to_thread.run_sync(used, memfs.path) == 0
