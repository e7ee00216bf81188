"""Guests outlive the daemon: killed at any moment, it is followed by another, and they notice a pause at the most."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import trio

from kvmsim.exits import HaltExit
from memfs.contract.conversion import convert, key_of
from memfs.contract.units import PAGE_SHIFT
from tests.helpers import pages

from .conftest import Memfs, MountMemfs, memfs_command, run, stat_json, state_of
from .native import PAGES, NewGuest, kvm_guest, native_guest, unicorn_guest

__all__ = ["kvm_guest", "native_guest", "unicorn_guest"]

DEATHS = 20


@pytest.fixture
def lasting(mount_memfs: MountMemfs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Memfs:
    """A memfs that is followed by another as often as it is killed."""
    monkeypatch.setenv("MEMFS_INJECT", str(tmp_path / "inject"))
    memfs = mount_memfs("size=64m,survive=on")
    memfs.expected = ["killed by SIGKILL: going on"]
    return memfs


def kill(memfs: Memfs) -> None:
    """Kill the process that serves a memfs."""
    os.kill(state_of(memfs.path)["pid"], signal.SIGKILL)


def test_no_byte_is_wrong_and_no_conversion_fails(lasting: Memfs) -> None:
    """Of a guest on two vCPUs that converts, while somebody else takes memory of its from one side to the other."""
    paths = [lasting.path / name for name in ("shared", "private")]
    paths[0].touch()
    assert run(*memfs_command("create", paths[1], "--seals", "guest")).returncode == 0
    command = [sys.executable, "-m", "kvmsim", "run", "--mem", "16M", "--vcpus", "2", "--duration", "4"]
    command += ["--shared", str(paths[0]), "--private", str(paths[1])]
    fds = [os.open(path, os.O_RDWR) for path in paths]
    key = key_of(fds[0])
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as guest:
        while not os.fstat(fds[1]).st_blocks:
            assert guest.poll() is None
        for number in range(DEATHS):
            kill(lasting)
            convert(fds[1], key, [pages(3000 + number, 4096)], to_private=number % 2 == 0)
            time.sleep(0.05)  # not to wait for something, but so that deaths come at any moment of what the guest does
        said, _ = guest.communicate(timeout=60)
    blocks = [os.fstat(fd).st_blocks // 8 for fd in fds]
    for fd in fds:
        os.close(fd)
    assert guest.returncode == 0, said
    assert "every byte was as stored" in said, said
    state = state_of(lasting.path)
    assert (state["restarts"], state["owners_fenced"], state["owners"]) == (DEATHS, 0, 0)
    assert state["used"] == sum(blocks) << PAGE_SHIFT
    assert stat_json(lasting.path)["restarts"] == DEATHS


async def test_native_code_goes_on(lasting: Memfs, native_guest: NewGuest) -> None:
    """It stores, loads and converts at random on two vCPUs, and finds what it stored."""
    async with native_guest(on=lasting) as guest:
        vcpus = [guest.create("x", 2, PAGES, 3000, number) for number in range(2)]
        ended = []

        async def run_vcpu(number: int) -> None:
            ended.append(await guest.vmm.run(vcpus[number]))
            assert guest.engines[number].registers.rbx == 0

        async with trio.open_nursery() as nursery:
            for number in range(2):
                nursery.start_soon(run_vcpu, number)
            for _ in range(5):
                await trio.to_thread.run_sync(kill, lasting)
                await trio.to_thread.run_sync(os.statvfs, lasting.path)
                guest.check_windows()
        assert ended == [HaltExit(0)] * 2
        await guest.vm.catch_up()
        assert guest.vm.backing.resumed
