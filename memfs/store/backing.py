"""Where bytes live: a store of anonymous files with one size limit, behind a small interface.

A backing creates empty files, opens them and says how much space there is. Operations on a file (fallocate, truncate,
read, write) are ordinary system calls on its descriptor, by pages.py or, with passthrough, by the kernel itself; the
backing is asked only for space. A file that nobody uses needs no descriptor, so there can be more files than
descriptors: `locate` says how os.stat, os.utime and os.chmod find it.

There are two kinds: a tmpfs (tmpfs_backing.py) and, without CAP_SYS_ADMIN, memfds (memfd_backing.py).

Rejected: one memfd as an arena for all files (a punch would not be a punch any more, and passthrough needs a file per
file).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager
from typing import Any, ClassVar, NewType, Protocol

from memfs.contract.page_map import PageMaps
from memfs.contract.units import ByteOffset
from memfs.store.converted import Converted
from memfs.store.guest_mounts import Step
from memfs.store.reaper import Reaper
from memfs.store.strays import Watched

Content = NewType("Content", int)  #: a backing's number for one of its files


class Backing(Protocol):
    """A store of anonymous files with one size limit."""

    kind: ClassVar[str]  #: for people: "tmpfs", "memfd"
    accounted: ClassVar[bool]  #: whether pages of ordinary files must be reserved, too
    reaper: Reaper  #: large files that nobody refers to any more
    converted: Converted  #: of guest-sealed files

    @property
    def most_files(self) -> int:
        """How many files it can have."""

    @property
    def page_maps(self) -> PageMaps:
        """The page maps of tracked files."""

    @property
    def guest_pinned(self) -> bool:
        """Whether pages of guest-sealed files are never swapped."""

    @property
    def guest_granule(self) -> int:
        """In what multiples, in bytes, guest-sealed files get and lose pages, at offsets that are such multiples."""

    @property
    def guest_needs_steps(self) -> bool:
        """Whether a single call would allocate pages besides those that were asked for."""

    def guest_steps(self, offset: ByteOffset, length: int) -> Iterator[Step]:
        """Generate in which calls to allocate bytes of a guest-sealed file, so that no page is allocated besides."""

    def create(self, number: int, *, guest: bool) -> tuple[Content, int]:
        """Create an empty file, and open it: `open` says what the descriptor is. Raises OSError(EMFILE).

        Of each number (> 0) there may be one that is for a guest and one that is not.
        """

    def find(self, number: int, *, guest: bool) -> Content:
        """Return the content id of a file that another process has created."""

    def recovered(self, total_pages: int, guest_pages: int) -> None:
        """Go on where another process was killed: its limit, and how many pages its tracked files have."""

    def open(self, content: Content) -> int:
        """Return a descriptor of a file, for reading and writing. Raises OSError(EMFILE)."""

    def shut(self, fd: int) -> None:
        """Undo one `open`."""

    def locate(self, content: Content) -> tuple[int | str, int | None]:
        """Return what os.stat, os.utime and os.chmod take for a file: a path or a descriptor, and `dir_fd`."""

    def free(self, content: Content) -> None:
        """Remove a file. Its memory lives until its last descriptor is closed."""

    def reserve(self, pages: int, given: int = 0) -> None:
        """Reserve space for pages of a tracked file. Raises OSError(ENOSPC), reserving nothing.

        `given` is how many pages of another file will be freed as soon as these are allocated. They count as free; in
        between, there are more pages than there may be.
        """

    def lend(self, pages: int) -> AbstractContextManager[None]:
        """Let an untracked file have pages that a guest-sealed file is about to give: they are freed after the block.

        In between, there are more pages than there may be.
        """

    def unreserve(self, pages: int) -> None:
        """Undo `reserve` for pages that were freed, or reserved and not allocated."""

    def watch(self, file: Watched) -> None:
        """Account for what an owner allocates by itself of a tracked file, of which it has been given a descriptor."""

    def unwatch(self, file: Watched) -> None:
        """Undo `watch`, if it was called: the file is freed, or nobody has a descriptor of it any more."""

    def earmarked(self, pages: int) -> AbstractContextManager[bool]:
        """Earmark space for pages of an untracked file while they are allocated; true if there is enough."""

    @property
    def total_pages(self) -> int:
        """The limit, in pages."""

    @property
    def used_pages(self) -> int:
        """How many pages are in use or reserved: more than there may be, where an owner has allocated by itself."""

    @property
    def free_pages(self) -> int:
        """How many pages can still be allocated to ordinary files; to others also what is kept for them."""

    def describe(self) -> dict[str, Any]:
        """Return for `memfs stat` how huge pages are used, numbers in bytes."""

    def resize(self, size: int) -> None:
        """Change the limit to `size` bytes. Raises OSError(EINVAL) below what is in use, changing nothing."""

    def set_access_times(self, atime: str) -> None:
        """Have reads in passthrough mode set access times: "relatime", "strictatime" or (as at first) "noatime"."""

    async def run(self) -> None:
        """Free what can wait to be freed, until cancelled. What comes while it does not run is freed immediately."""

    def close(self) -> None:
        """Close the backing. Files live until their descriptors are closed."""
