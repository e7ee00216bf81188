"""What a service manager is told (sd_notify(3)): that the mount answers, what is in use, that we live.

systemd names a datagram socket in NOTIFY_SOCKET for a unit of Type=notify, and says in WATCHDOG_USEC how often it wants
to hear from a service that has a watchdog. We tell it so by the event loop that answers the kernel and owners: a loop
that is stuck tells nothing, and systemd ends it. Without these variables there is nothing to tell.

It also keeps descriptors for us (FileDescriptorStoreMax=), and hands them over when it starts us again
(handed_over.py).

Rejected: systemd's Python bindings (C, for twenty lines); a task of its own for each kind of message.
"""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Final

import trio

from memfs.contract.sys.rights import to_rights

_STATUS_INTERVAL: Final = 10.0  # seconds between two lines of status
_MICROSECONDS: Final = 1_000_000


_ADDRESS: Final = "NOTIFY_SOCKET"
_INHERITED: Final = (_ADDRESS, "WATCHDOG_USEC")


def inherited() -> dict[str, str]:
    """Return by what variables of the environment a process finds who started us."""
    return {name: os.environ[name] for name in _INHERITED if name in os.environ}


def main_process(pid: int) -> None:
    """Tell which process takes our place."""
    _tell(os.environ.get(_ADDRESS, ""), f"MAINPID={pid}")


def store(name: str, fd: int, *, watched: bool) -> bool:
    """Give a descriptor to be kept, and return whether there is anybody who might.

    `watched`: it is to be let go when it is at its end, which poll(2) says; not for one that cannot be asked.
    """
    address = os.environ.get(_ADDRESS, "")
    _tell(address, "FDSTORE=1", f"FDNAME={name}", *([] if watched else ["FDPOLL=0"]), fds=[fd])
    return bool(address)


def forget(name: str) -> None:
    """Have the descriptors of a name be kept no longer."""
    _tell(os.environ.get(_ADDRESS, ""), "FDSTOREREMOVE=1", f"FDNAME={name}")


def _tell(address: str, *lines: str, fds: Sequence[int] = ()) -> None:
    """Send what is to be told, perhaps with descriptors. Whether anybody hears it is not our business."""
    if address:
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as notify, suppress(OSError):
            notify.setblocking(False)
            notify.sendmsg(["\n".join(lines).encode()], to_rights(fds), 0, address.replace("@", "\0", 1))


class ServiceManager:
    """Who started us and wants to hear of us, if anybody does. Takes that from the environment of its children."""

    def __init__(self) -> None:
        self._address: Final = os.environ.pop(_ADDRESS, "")
        watched, pid = os.environ.pop("WATCHDOG_USEC", ""), os.environ.pop("WATCHDOG_PID", "")
        is_meant = pid in ("", str(os.getpid()), str(os.getppid()))  # or our keeper
        self._watchdog: Final = int(watched) / _MICROSECONDS if watched.isdecimal() and is_meant else None  # seconds

    async def run(self, status: Callable[[], str]) -> None:
        """Tell that we are ready, and from then on that we are alive and what the status is."""
        if not self._address:
            return
        self.tell("READY=1", f"STATUS={status()}")
        interval = min(_STATUS_INTERVAL, self._watchdog / 2 if self._watchdog else _STATUS_INTERVAL)
        while True:
            await trio.sleep(interval)
            self.tell("WATCHDOG=1", f"STATUS={status()}")

    def reloading(self) -> None:
        """Tell that what was configured is read anew; `reloaded` must follow."""
        self.tell("RELOADING=1", f"MONOTONIC_USEC={time.clock_gettime_ns(time.CLOCK_MONOTONIC) // 1000}")

    def reloaded(self) -> None:
        """Tell that it has been read."""
        self.tell("READY=1")

    def stopping(self) -> None:
        """Tell that we are ending."""
        self.tell("STOPPING=1")

    def tell(self, *lines: str) -> None:
        """Send what is to be told. Whether anybody hears it is not our business."""
        _tell(self._address, *lines)
