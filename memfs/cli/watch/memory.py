"""The memory of a guest, as seen on the one or two files that it lies on.

Files are opened with access mode 3 (open(2)): whoever may read and write them may, and such a handle keeps nobody from
sealing or converting the file, as one for reading would.
"""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Final

import numpy as np

from memfs.cli.command import CommandError
from memfs.cli.watch.extents import Extents
from memfs.contract.on_memfs import OnMemfs, locate, naming
from memfs.contract.picture import COLUMNS, ROWS, Memory
from memfs.contract.runs import NO_RUNS, Runs, merged, runs_of
from memfs.contract.units import ORDER_2M, ByteOffset, PageIndex, PageRange, bytes_to_pages, page_ceil

MOST_CALLS: Final = 8  #: of a look in each file, which comes back: less than a millisecond of the daemon's event loop
PAUSE: Final = 0.05  #: seconds between looks at what one was not enough for


@dataclass(slots=True)
class _Seen:
    """What is known of one file."""

    path: str
    ino: int | None = None  # that it has to have
    extents: Extents = field(default_factory=Extents)
    is_guest: bool = False
    size: int = 0
    locked: Runs = field(default_factory=lambda: NO_RUNS)


class GuestMemory:
    """The memory on one file, or on an ordinary and a guest-sealed one, from one page up to another.

    `paths`, or pairs of a path and the inode number that must be found there.
    """

    def __init__(self, paths: Sequence[str | tuple[str, int]], window: PageRange | None = None) -> None:
        self._files: Final = [_Seen(each) if isinstance(each, str) else _Seen(*each) for each in paths]
        self._window: Final = window
        self.pages = 0  #: how many all of it has, as last seen

    def look(self, most_calls: int = MOST_CALLS) -> tuple[Memory, bool]:
        """Look at some of it. Returns what is known of it now, and whether that was all there is to look at.

        Blocking. Raises OSError; CommandError for files that are not a guest's memory.
        """
        is_all = True
        with_fds: list[tuple[_Seen, int]] = []
        try:
            for seen in self._files:
                with locate(seen.path) as file:
                    with_fds.append((seen, self._open(seen, file)))
            pages = self._pages()
            around = pages.rounded(1 << ORDER_2M)  # whether a page is in a whole block shows beside it
            cell = -(-len(pages) // (COLUMNS * ROWS))
            for seen, fd in with_fds:
                with naming(seen.path):
                    is_all &= seen.extents.look(fd, around, cell, most_calls)
        finally:
            for _, fd in with_fds:
                os.close(fd)
        return self._memory(pages), is_all

    def look_at_all(self) -> Memory:
        """Look until all of it has been seen. Raises as `look`."""
        while True:
            memory, is_all = self.look(1 << 10)
            if is_all:
                return memory

    def _open(self, seen: _Seen, file: OnMemfs) -> int:
        status = os.fstat(file.fd)
        if seen.ino is not None and status.st_ino != seen.ino:
            raise OSError(errno.ESTALE, "another file has taken its place", seen.path)
        seen.size = status.st_size
        fd = file.open(os.O_ACCMODE)  # of regular files only
        try:
            seen.is_guest = seen.is_guest or "guest" in file.get("user.memfs.seals").split(",")
            with suppress(OSError):  # of an older memfs
                seen.locked = _locked(file.get("user.memfs.locks"))
        except BaseException:
            os.close(fd)
            raise
        return fd

    def _pages(self) -> PageRange:
        if len(self._files) > 1 and len({seen.is_guest for seen in self._files}) == 1:
            what = "guest-sealed" if self._files[0].is_guest else "ordinary"
            raise CommandError(f"both files are {what}; a guest's memory lies on an ordinary and a guest-sealed one")
        size = page_ceil(ByteOffset(max(seen.size for seen in self._files)))
        if not size:
            raise CommandError(f"{self._files[0].path}: the file is empty: there is no memory to show")
        self.pages = size
        window = self._window or PageRange(PageIndex(0), size)
        pages = window.intersect(PageRange(PageIndex(0), size))
        if pages is None:
            raise CommandError(f"{self._files[0].path}: it ends before that, after {bytes_to_pages(size)} pages")
        return pages

    def _memory(self, pages: PageRange) -> Memory:
        def runs(is_guest: bool) -> Runs:
            return next((seen.extents.runs for seen in self._files if seen.is_guest is is_guest), NO_RUNS)

        locked = np.concatenate([seen.locked for seen in self._files])
        locked = merged(locked[locked[:, 0].argsort(kind="stable")])
        return Memory.of(pages, runs(True), runs(False), locked)


def _locked(said: str) -> Runs:
    """Return the runs that a file says are locked; none if that makes no sense."""
    try:
        edges = [int(edge) for run in json.loads(said)["runs"] for edge in run]
        in_order = all(before <= after for before, after in pairwise([0, *edges]))
        return merged(runs_of(zip(edges[::2], edges[1::2], strict=True))) if in_order else NO_RUNS
    except (ArithmeticError, LookupError, TypeError, ValueError, RecursionError):
        return NO_RUNS
