"""Who waits, and who does not: requests that have to wait for an owner, or move much data, hold up nobody else."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import trio

from memfs.contract.protocol.messages import InvalidateBegin
from memfs.contract.units import PAGE_SIZE

from .conftest import Memfs
from .owner import Owner, connected, shell

FILES = 120  # more than pyfuse3 has tasks

#: Truncates all files of a directory at once, with a thread each, and then ends
TRUNCATES = """
import os, sys, threading
threads = [threading.Thread(target=os.truncate, args=(entry.path, 0)) for entry in os.scandir(sys.argv[1])]
[thread.start() for thread in threads]
[thread.join() for thread in threads]
"""

#: Overwrites 8 files with O_DIRECT, a mebibyte at a time, until its input ends; says when all have begun
WRITES = """
import mmap, os, sys, threading
begun, ends = threading.Semaphore(0), threading.Event()
def write(number):
    fd = os.open(f"large{number}", os.O_CREAT | os.O_RDWR | os.O_DIRECT)
    data = mmap.mmap(-1, 1 << 20)
    data[:] = bytes([number]) * len(data)
    while True:
        assert os.pwrite(fd, data, 0) == len(data)
        begun.release()
        if ends.is_set():
            assert os.preadv(fd, [data], 0) == len(data) and data[:] == bytes([number]) * len(data)
            return
threads = [threading.Thread(target=write, args=(number,)) for number in range(8)]
[thread.start() for thread in threads]
[begun.acquire() for _ in range(100)]
print("writing", end="", flush=True)
sys.stdin.read()
ends.set()
[thread.join() for thread in threads]
"""


async def others_are_answered(path: Path) -> None:
    """Ask for what has nothing to do with the files that are waited for."""
    for command in (
        ["stat", "--format", "%s", "small"],
        ["stat", "--file-system", "."],
        ["mkdir", "directory"],
        ["touch", "directory/new"],
        ["ln", "--symbolic", "new", "directory/link"],
        ["mv", "directory/new", "directory/renamed"],
        ["chmod", "600", "directory/renamed"],
        ["truncate", "--size", "100", "directory/renamed"],
        ["ls", "-l", "directory"],
        ["rm", "--recursive", "directory"],
    ):
        result = await shell(*command, cwd=path)
        assert result.returncode == 0, result.stderr


async def until_asked(owner: Owner, count: int) -> None:
    """Wait until the owner has been told to unmap pages so many times."""
    while sum(isinstance(message, InvalidateBegin) for message in owner.heard) < count:
        owner.arrived = trio.Event()
        await owner.arrived.wait()


@asynccontextmanager
async def truncating(memfs: Memfs, count: int) -> AsyncIterator[tuple[Owner, trio.Process]]:
    """Files whose owner does not acknowledge, each being truncated; when all acknowledges are there, that must end."""
    directory = memfs.path / "files"
    await shell("mkdir", directory, cwd=memfs.path)
    await shell("touch", "small", cwd=memfs.path)
    async with connected(memfs.socket) as owner:
        for number in range(count):
            await shell("fallocate", "--length", str(PAGE_SIZE), directory / str(number), cwd=memfs.path)
            await owner.register(directory / str(number))
        owner.acknowledge = trio.Event()
        async with trio.open_nursery() as nursery:
            process: trio.Process = await nursery.start(trio.run_process, [sys.executable, "-c", TRUNCATES, directory])
            await until_asked(owner, count)
            yield owner, process
            assert process.returncode is None
            owner.acknowledge.set()
        assert process.returncode == 0
    sizes = await shell("stat", "--format", "%s", *(str(number) for number in range(count)), cwd=directory)
    assert sizes.stdout == b"0\n" * count


async def test_many_truncations_that_wait_for_an_owner_hold_up_nobody(mount_memfs: Callable[..., Memfs]) -> None:
    memfs = mount_memfs("size=64m,notify_timeout=60")
    async with truncating(memfs, FILES) as (owner, _):
        await others_are_answered(memfs.path)
        assert not owner.acknowledge.is_set()


async def test_truncation_that_waits_for_another_can_be_interrupted(mount_memfs: Callable[..., Memfs]) -> None:
    memfs = mount_memfs("size=64m,notify_timeout=60")
    async with truncating(memfs, 1):
        second = await trio.lowlevel.open_process(["truncate", "--size", "8192", memfs.path / "files" / "0"])
        await trio.sleep(0.2)
        assert second.poll() is None
        second.terminate()
        assert await second.wait() != 0


async def test_large_direct_writes_hold_up_nobody(mount_memfs: Callable[..., Memfs]) -> None:
    memfs = mount_memfs("size=64m,passthrough=off")
    await shell("touch", "small", cwd=memfs.path)
    writer = await trio.lowlevel.open_process(
        [sys.executable, "-c", WRITES], cwd=memfs.path, stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    assert writer.stdin is not None
    assert writer.stdout is not None
    assert await writer.stdout.receive_some() == b"writing"
    for _ in range(3):
        await others_are_answered(memfs.path)
    assert writer.poll() is None
    await writer.stdin.aclose()
    assert await writer.wait() == 0
    await writer.stdout.aclose()
    sizes = await shell("stat", "--format", "%s", *(f"large{number}" for number in range(8)), cwd=memfs.path)
    assert sizes.stdout == b"1048576\n" * 8
