"""What comes goes again: after thousands of files the daemon has the memory, descriptors and pages it began with."""

from __future__ import annotations

import gc
import os
import time
from pathlib import Path

import pytest

from .conftest import Memfs

ROUNDS = int(os.environ.get("MEMFS_LEAK_ROUNDS", "6000"))  # a million in the long run
MANY = 5000
FOR_100K_FILES = 100 << 20  # bytes that the daemon may take for so many, what it takes for itself included
ALLOWED = 4 << 20  # bytes that the daemon's memory may grow by: an allocator's slack, not a file's worth each


def resident(pid: int) -> int:
    """Private memory of a process, in bytes (proc_pid_status(5))."""
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("RssAnon:")) << 10


def churn(directory: Path, rounds: int) -> None:
    for number in range(rounds):
        path = directory / str(number % 50)
        fd = os.open(path, os.O_CREAT | os.O_RDWR)
        os.write(fd, b"content")
        os.setxattr(fd, "user.a", b"value")
        os.close(fd)
        os.link(path, directory / "link")
        os.rename(directory / "link", directory / "renamed")
        os.close(os.open(path, os.O_RDONLY))
        os.unlink(directory / "renamed")
        os.unlink(path)
        if number % 10 == 0:
            os.mkdir(path)
            os.setxattr(path, "user.memfs.default_seals", b"guest")
            (path / "sealed").touch()
            os.unlink(path / "sealed")
            os.rmdir(path)


def when_forgotten(path: Path) -> os.statvfs_result:
    """Return statvfs(3) when there is no inode but the root's; the kernel forgets a file a moment after it is gone."""
    deadline = time.monotonic() + 5
    while (usage := os.statvfs(path)).f_files - usage.f_ffree > 1 and time.monotonic() < deadline:
        time.sleep(0.01)
    return usage


@pytest.mark.timeout(3600)
def test_nothing_is_left_of_files_that_are_gone(memfs: Memfs) -> None:
    descriptors = Path(f"/proc/{memfs.process.pid}/fd")
    churn(memfs.path, 1000)  # what is allocated once
    before = resident(memfs.process.pid), len(list(descriptors.iterdir()))
    usage = when_forgotten(memfs.path)
    churn(memfs.path, ROUNDS)
    gc.collect()
    after = resident(memfs.process.pid), len(list(descriptors.iterdir()))
    assert after[1] <= before[1]
    assert after[0] - before[0] < ALLOWED
    now = when_forgotten(memfs.path)
    assert (now.f_bfree, now.f_ffree) == (usage.f_bfree, usage.f_ffree)
    # The tmpfs that files lie on has none of them left either: only its root.
    assert now.f_files - now.f_ffree == 1


def test_files_take_little_of_the_daemon_whatever_their_size(memfs: Memfs) -> None:
    pid, descriptors = memfs.process.pid, Path(f"/proc/{memfs.process.pid}/fd")
    (memfs.path / "warm").touch()
    before, opened = resident(pid), len(list(descriptors.iterdir()))
    for number in range(MANY):
        with open(memfs.path / f"file-{number}", "wb") as file:
            file.truncate(number << 30)  # the last is 5 TB
    each = (resident(pid) - before) / MANY
    assert before + each * 100_000 < FOR_100K_FILES
    assert len(list(descriptors.iterdir())) < opened + MANY // 100  # the kernel releases what was closed a bit later
