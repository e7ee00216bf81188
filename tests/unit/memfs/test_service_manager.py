"""What a service manager hears, by a real socket."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest
import trio
import trio.testing

from memfs.service_manager import ServiceManager


@pytest.fixture
def manager(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[socket.socket]:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager:
        manager.bind(str(tmp_path / "notify"))
        manager.setblocking(False)
        monkeypatch.setenv("NOTIFY_SOCKET", str(tmp_path / "notify"))
        yield manager


def heard(manager: socket.socket) -> list[str]:
    lines = []
    while True:
        try:
            lines += manager.recv(4096).decode().split("\n")
        except BlockingIOError:
            return lines


@pytest.mark.parametrize(
    ("pid", "seconds"),
    [("", 2.0), (str(os.getpid()), 2.0), (str(os.getppid()), 2.0), ("0", 10.0)],
    ids=["anybody", "this process", "its keeper", "another"],
)
async def test_alive_is_told_twice_in_each_interval_of_the_watchdog(
    manager: socket.socket,
    monkeypatch: pytest.MonkeyPatch,
    autojump_clock: trio.testing.MockClock,
    pid: str,
    seconds: float,
) -> None:
    monkeypatch.setenv("WATCHDOG_USEC", "4000000")
    monkeypatch.setenv("WATCHDOG_PID", pid)
    usage = iter(range(100))
    service = ServiceManager()
    with trio.move_on_after(3.5 * seconds):
        await service.run(lambda: f"{next(usage)} bytes")
    assert heard(manager) == [
        *("READY=1", "STATUS=0 bytes"),
        *(line for number in (1, 2, 3) for line in ("WATCHDOG=1", f"STATUS={number} bytes")),
    ]


def test_a_reload_begins_and_ends(manager: socket.socket) -> None:
    service = ServiceManager()
    service.reloading()
    service.reloaded()
    service.stopping()
    first, when, *others = heard(manager)
    assert (first, others) == ("RELOADING=1", ["READY=1", "STOPPING=1"])
    assert when.removeprefix("MONOTONIC_USEC=").isdecimal()


def test_children_do_not_hear_of_it(manager: socket.socket, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WATCHDOG_USEC", "4000000")
    ServiceManager()
    assert not {"NOTIFY_SOCKET", "WATCHDOG_USEC", "WATCHDOG_PID"} & os.environ.keys()


async def test_nobody_is_told_without_a_manager_or_when_it_is_gone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("NOTIFY_SOCKET", raising=False)
    await ServiceManager().run(lambda: "status")
    monkeypatch.setenv("NOTIFY_SOCKET", str(tmp_path / "gone"))
    ServiceManager().stopping()
