"""Changes of the mounts of our mount namespace: mounted, unmounted, moved, mounted again with other options."""

from __future__ import annotations

import select
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager

import trio


@contextmanager
def mount_changes() -> Iterator[Callable[[], Awaitable[None]]]:
    """Watch the mounts: yields what waits for a change, or several, since it last returned. Raises OSError(EMFILE).

    proc_pid_mountinfo(5): POLLPRI.
    """
    with open("/proc/self/mountinfo") as table, select.epoll() as changes:
        # To read, it is always ready; in an epoll of its own only what is of interest counts.
        changes.register(table, select.EPOLLPRI | select.EPOLLET)

        async def changed() -> None:
            await trio.lowlevel.wait_readable(changes.fileno())
            changes.poll(0)

        yield changed
