"""Fault injection for tests: named points where memfs, or kvmsim, can be made to fail, to wait or to die.

Off in production: it is on only for a process whose environment has MEMFS_INJECT, the name of a file. A test arms one
point at a time by writing "POINT KIND" to that file; whoever comes to the point first removes the file and does it:

    fail    OSError(EIO)
    delay   wait for DELAY seconds
    kill    SIGKILL to itself

The points are the steps of giving and taking memory (store/file.py), of telling an owner (owners/registry.py), of an
owner that is told (kvmsim/backing.py), and of messages in either process (protocol/peer.py). What failing means there
is decided by whoever has the point, as for any other error.
"""

from __future__ import annotations

import enum
import errno
import os
import signal
import time
from typing import Final

import trio

DELAY: Final = 0.05  #: seconds
_FILE: Final = os.environ.get("MEMFS_INJECT")


class Point(enum.Enum):
    """Where."""

    BEFORE_BEGIN = "before-begin"
    AFTER_BEGIN = "after-begin"
    BEFORE_FREE = "before-free"
    AFTER_FREE = "after-free"
    BEFORE_ALLOCATE = "before-allocate"
    AFTER_ALLOCATE = "after-allocate"
    BEFORE_ACCOUNT = "before-account"
    AFTER_ACCOUNT = "after-account"
    BEFORE_END = "before-end"
    AFTER_END = "after-end"
    BEFORE_TELL = "before-tell"  # that pages have come
    AFTER_TELL = "after-tell"
    BEFORE_SEND = "before-send"
    AFTER_SEND = "after-send"
    BEFORE_RECEIVE = "before-receive"
    AFTER_RECEIVE = "after-receive"


class Kind(enum.Enum):
    """What."""

    FAIL = "fail"
    DELAY = "delay"
    KILL = "kill"


def are_injected() -> bool:
    """Whether anything may fail, or wait, where it otherwise never does."""
    return _FILE is not None


async def reach(point: Point) -> None:
    """We are at a point where others may come in between. Raises OSError(EIO) if it is to fail."""
    if _FILE is not None and _armed(point):
        await trio.sleep(DELAY)


def reach_at_once(point: Point) -> None:
    """The same where nobody may come in between: a delay holds up everybody, as if the process did not get a CPU."""
    if _FILE is not None and _armed(point):
        time.sleep(DELAY)


def _armed(point: Point) -> bool:
    """Whether there is to be a delay."""
    assert _FILE is not None
    try:
        with open(_FILE) as file:
            name, kind = file.read().split()
        if name != point.value:
            return False
        os.unlink(_FILE)
    except (FileNotFoundError, ValueError):  # nothing is armed, or it is being written
        return False
    match Kind(kind):
        case Kind.FAIL:
            raise OSError(errno.EIO, f"injected: {name}")
        case Kind.KILL:
            os.kill(os.getpid(), signal.SIGKILL)
    return True
