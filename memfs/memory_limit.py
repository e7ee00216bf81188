"""The limit of the memory cgroup that the daemon is in (cgroups(7)), which may be lower than what files may take.

The kernel charges a page to the process that allocates it. A write or a fault in passthrough mode is the program's own;
but what fallocate(2) allocates, and without passthrough all content, is the daemon's. So a limit of the program's
cgroup does not hold for that, and beyond a limit of the daemon's the kernel kills it, and all files end. Nothing is
wrong with a limit that is higher than `size=`; of one that is not, people are warned when it is mounted.

Rejected:
- to allocate in the program's cgroup, by a process of ours that joins it: the cgroup could not be removed while that is
  there, it would be killed with the others, and to join takes a hundred times as long as to allocate a page.
- to leave it to the program's own faults: a page is private if and only if it is allocated, and one that was promised
  and is not there could not be promised, since in passthrough mode the kernel gives the space to whoever writes first.
- a count for each cgroup by memfs: passthrough writes are seen by the kernel alone.
- to have the kernel kill others first (oom_score_adj): within a cgroup there may be nobody else.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Final

from memfs.contract.sys.mountinfo import mounts_of_type

_UNLIMITED: Final = 1 << 60  # bytes: cgroup v1 says so by a number close to 1 << 63
_OWN: Final = 64 << 20  # bytes that memfs takes for itself


class MemoryLimit:
    """The limit of a cgroup and of those above it: the lowest counts. `files` are those that say it."""

    def __init__(self, files: Iterable[Path]) -> None:
        self._files: Final = list(files)

    @classmethod
    def of_this_process(cls) -> MemoryLimit:
        """Find the memory cgroups that this process is in. Not for the event loop."""
        try:
            memberships = Path("/proc/self/cgroup").read_text(errors="surrogateescape").splitlines()
        except OSError:  # a kernel without cgroups
            return cls(())
        return cls(file for line in memberships for file in _files(*line.split(":", 2)))

    @property
    def lowest(self) -> int | None:
        """The limit in bytes as it is now; None if there is none."""
        return min(filter(None, map(_read, self._files)), default=None)


def _files(number: str, controllers: str, path: str) -> Iterator[Path]:
    """Generate the files with the limits of a cgroup and of those above it, by its line in /proc/self/cgroup."""
    if number == "0":
        name, mounts = "memory.max", mounts_of_type("cgroup2")
    elif "memory" in controllers.split(","):
        name, mounts = "memory.limit_in_bytes", mounts_of_type("cgroup")
        mounts = [mount for mount in mounts if "memory" in mount.options.split(",")]
    else:
        return
    for mount in mounts[:1]:
        below = Path(os.path.relpath(path, mount.root))
        if ".." not in below.parts:  # otherwise it is not seen from this cgroup namespace
            yield from (Path(mount.mountpoint) / each / name for each in (below, *below.parents))


def _read(file: Path) -> int | None:
    try:
        limit = int(file.read_text())
    except (OSError, ValueError):  # the topmost cgroup of v2 has none; "max"
        return None
    return limit if limit < _UNLIMITED else None


def warning(limit: int | None, size: int) -> str | None:
    """Return what to say of a limit, a sentence for people, if files may take `size` bytes; None if it is fine."""
    if limit is None or limit >= size + _OWN:
        return None
    return (
        f"the memory cgroup of memfs allows {limit} bytes, and files may take {size}, with {_OWN} for memfs itself: "
        "when they take more than is allowed, the kernel kills memfs, and all files end; raise the limit "
        "(systemd: MemoryMax=), or make size= smaller"
    )
