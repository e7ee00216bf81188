"""A standstill of everything is nobody's fault."""

from __future__ import annotations

import signal
from functools import partial

import trio

from memfs.contract.units import PAGE_SIZE

from .conftest import MountMemfs
from .owner import connected, shell

TIMEOUT = 1.0  # seconds that an owner has to acknowledge


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
