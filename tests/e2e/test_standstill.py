"""A standstill of everything is nobody's fault."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from functools import partial
from pathlib import Path

import pytest
import trio

from memfs.contract.sys.mountinfo import mounts_of_type
from memfs.contract.units import PAGE_SIZE

from .conftest import STOP_TIMEOUT, MountMemfs
from .owner import connected, shell

TIMEOUT = 1.0  # seconds that an owner has to acknowledge

#: Owns a file; acknowledges when its input has a line, and says in the end whether it is still connected
OWNER = """
import os, sys, trio
from memfs.contract.protocol import connect
async def main():
    async def hear(message):
        print("asked", flush=True)
        await trio.to_thread.run_sync(sys.stdin.readline)
    async with connect(sys.argv[1], "test", hear) as client:
        await client.register(os.open(sys.argv[2], os.O_RDWR))
        print("owns", flush=True)
        with trio.move_on_after(30):
            await client.ended.wait()
        print("is fenced", flush=True)
trio.run(main)
"""

#: Stops processes for as long as the block
Stopping = Callable[..., AbstractContextManager[None]]


@contextmanager
def stopped(*processes: subprocess.Popen[str]) -> Iterator[None]:
    for process in processes:
        process.send_signal(signal.SIGSTOP)
    try:
        yield
    finally:
        for process in processes:
            process.send_signal(signal.SIGCONT)


@contextmanager
def frozen(*processes: subprocess.Popen[str]) -> Iterator[None]:
    tops = [Path(mount.mountpoint) for mount in mounts_of_type("cgroup2")]
    if not tops:
        pytest.skip("no cgroups of version 2")
    cgroup = tops[0] / f"memfs-test-{os.getpid()}"
    homes = [Path(f"/proc/{process.pid}/cgroup").read_text().rpartition("0::/")[2].strip() for process in processes]
    with ExitStack() as undo:
        try:
            cgroup.mkdir()
            undo.callback(cgroup.rmdir)
            for process, home in zip(processes, homes, strict=True):
                (cgroup / "cgroup.procs").write_text(str(process.pid))
                undo.callback((tops[0] / home / "cgroup.procs").write_text, str(process.pid))
            (cgroup / "cgroup.freeze").write_text("1")
        except OSError as error:
            pytest.skip(f"no cgroup of our own: {error}")
        undo.callback((cgroup / "cgroup.freeze").write_text, "0")
        while "frozen 1" not in (cgroup / "cgroup.events").read_text():
            time.sleep(0.01)
        yield


@pytest.mark.parametrize("standing_still", [stopped, frozen])
def test_both_stand_still_for_longer_than_an_owner_has(mount_memfs: MountMemfs, standing_still: Stopping) -> None:
    memfs = mount_memfs(f"size=64m,notify_timeout={TIMEOUT}")
    memfs.run("fallocate", "--length", str(PAGE_SIZE), "file")
    command = [sys.executable, "-c", OWNER, str(memfs.socket), str(memfs.path / "file")]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as owner:
        assert owner.stdin is not None
        assert owner.stdout is not None
        try:
            assert owner.stdout.readline() == "owns\n"
            with subprocess.Popen(["truncate", "--size", "0", memfs.path / "file"]) as truncation:
                assert owner.stdout.readline() == "asked\n"
                with standing_still(memfs.process, owner):
                    owner.stdin.write("\n\n")
                    owner.stdin.flush()
                    time.sleep(1.5 * TIMEOUT)
                assert owner.stdout.readline() == "asked\n"  # that it is over
                assert truncation.wait(STOP_TIMEOUT) == 0
            assert "is fenced" not in memfs.log.read_text()
        finally:
            owner.kill()


async def test_owner_that_stood_still_together_with_the_daemon_is_not_fenced(mount_memfs: MountMemfs) -> None:
    """Of a machine that is suspended, or a cgroup that is frozen, the owner can do no more than the daemon."""
    memfs = mount_memfs(f"size=64m,notify_timeout={TIMEOUT}")
    await shell("fallocate", "--length", str(PAGE_SIZE), "file", cwd=memfs.path)
    async with connected(memfs.socket) as owner:
        await owner.register(memfs.path / "file")
        owner.acknowledge = trio.Event()  # it stands still, from the moment at which it is asked
        async with trio.open_nursery() as nursery:
            owner.arrived = trio.Event()
            nursery.start_soon(partial(trio.run_process, ["truncate", "--size", "0", "file"], cwd=memfs.path))
            await owner.arrived.wait()
            memfs.process.send_signal(signal.SIGSTOP)
            try:
                await trio.sleep(1.5 * TIMEOUT)
            finally:
                memfs.process.send_signal(signal.SIGCONT)
            await trio.sleep(0.3 * TIMEOUT)
            assert not owner.gone.is_set()
            owner.acknowledge.set()
        assert not owner.gone.is_set()
