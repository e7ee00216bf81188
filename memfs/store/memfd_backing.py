"""Files on memfds, which anybody may create but which have no limit of the kernel's.

A fallocate of 2**62 bytes on one ends in the OOM killer. So `reserve` comes before each allocation; that is exact only
because no handle is in passthrough mode then, and every allocation goes by file.py, except for those of owners, which
are counted afterwards. A memfd lives by its descriptor, so each file takes one.
"""

from __future__ import annotations

import errno
import os
import resource
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, ClassVar, Final

from memfs.contract.page_map import MapMemfds
from memfs.contract.units import PAGE_SIZE, ByteOffset, bytes_to_pages
from memfs.store.backing import Content
from memfs.store.converted import Converted
from memfs.store.guest_mounts import Step
from memfs.store.reaper import Reaper
from memfs.store.strays import Strays, Watched


class MemfdBacking:
    """Memfds, and a count of their pages. `size` in bytes."""

    kind: ClassVar[str] = "memfd"
    accounted: ClassVar[bool] = True

    def __init__(self, size: int) -> None:
        self._total = bytes_to_pages(size)
        #: each takes a descriptor; the other half is for those that are open
        self.most_files: Final = resource.getrlimit(resource.RLIMIT_NOFILE)[0] // 2
        self._reserved = 0  # pages that files have, or are about to have, by memfs
        self._strays: Final = Strays()
        self.reaper = Reaper()
        self.converted = Converted()
        self.page_maps: Final = MapMemfds()

    @property
    def guest_pinned(self) -> bool:
        """False: memfds may be swapped."""
        return False

    @property
    def guest_granule(self) -> int:
        """A page."""
        return PAGE_SIZE

    @property
    def guest_needs_steps(self) -> bool:
        """No."""
        return False

    def guest_steps(self, offset: ByteOffset, length: int) -> Iterator[Step]:
        """Generate one step."""
        yield offset, length, nullcontext()

    def create(self, number: int, *, guest: bool) -> tuple[Content, int]:
        """Create a memfd; its descriptor is the content id."""
        fd = os.memfd_create(f"memfs:{number}", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        return Content(fd), fd

    def find(self, number: int, *, guest: bool) -> Content:
        """Raise OSError: a memfd goes with the process that has it."""
        raise OSError(errno.ENOENT, "no memfd of another process")

    def recovered(self, total_pages: int, guest_pages: int) -> None:
        """Do nothing: there is nothing from before."""

    def open(self, content: Content) -> int:
        """Return the descriptor."""
        return content

    def shut(self, fd: int) -> None:
        """Do nothing: a memfd lives by its one descriptor."""

    def locate(self, content: Content) -> tuple[int, None]:
        """Return the descriptor."""
        return content, None

    def free(self, content: Content) -> None:
        """Close the descriptor."""
        os.close(content)

    def reserve(self, pages: int, given: int = 0) -> None:
        """Count pages that will be allocated."""
        more = pages - given
        if more > 0 and self._reserved + self._strays.pages + more > self._total and more > self.free_pages:
            raise OSError(errno.ENOSPC, f"{more} pages are needed, {self.free_pages} are free")
        self._reserved += pages

    def lend(self, pages: int) -> AbstractContextManager[None]:
        """Refuse: there are no untracked files."""
        raise AssertionError("all files are tracked")

    def unreserve(self, pages: int) -> None:
        """Count pages that were freed, or not allocated."""
        assert pages <= self._reserved, f"{pages} pages unreserved, {self._reserved} reserved"
        self._reserved -= pages

    def watch(self, file: Watched) -> None:
        """Count what the file has beyond what was reserved, whenever it is asked how much is in use."""
        self._strays.watch(file)

    def unwatch(self, file: Watched) -> None:
        """Do not count it any more."""
        self._strays.unwatch(file)

    @contextmanager
    def earmarked(self, pages: int) -> Iterator[bool]:
        """Do nothing: the pages have been reserved."""
        yield True

    @property
    def total_pages(self) -> int:
        """The limit, in pages."""
        return self._total

    @property
    def used_pages(self) -> int:
        """How many pages are reserved, or in use without having been."""
        return self._reserved + self._strays.count()

    @property
    def free_pages(self) -> int:
        """How many pages are not in use."""
        return max(0, self._total - self.used_pages)

    def describe(self) -> dict[str, Any]:
        """Return nothing: they lie on memfds, as others do."""
        return {}

    def resize(self, size: int) -> None:
        """Change the limit."""
        used = self.used_pages
        if bytes_to_pages(size) < used:
            raise OSError(errno.EINVAL, f"{used} pages are in use")
        self._total = bytes_to_pages(size)

    def set_access_times(self, atime: str) -> None:
        """Do nothing: memfds never pass through."""

    async def run(self) -> None:
        """Free large files."""
        await self.reaper.run()

    def close(self) -> None:
        """Do nothing: every memfd is a file's."""
