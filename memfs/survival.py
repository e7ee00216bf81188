"""How a worker takes over the mount of one that has died, and what it does about that meanwhile.

A worker that has a predecessor was forked from the keeper (keeper.py), so it has the mount, the backing and the socket.
What its predecessor knew it reads in the log (state/): inodes and names, what is open, what was being converted, the
limit. With that it builds the parts of the mount again, before it reads the first request. Files of the backing that
the log does not name nobody was told of, and they are removed.

Connections of owners have ended with the predecessor; they have some seconds to come back (owners/coming_back.py).
"""

from __future__ import annotations

import contextlib
import logging
import os
import select
import struct
import time
from collections.abc import Callable, Iterator
from typing import Final

import trio

from memfs import garbage
from memfs.contract.logs import fields
from memfs.contract.units import ByteOffset
from memfs.fuse.channel import Before
from memfs.fuse.init import INIT
from memfs.fuse.page_cache import PageCache
from memfs.fuse.resent import TRY
from memfs.keeper import Worker
from memfs.opening import Opened
from memfs.owners.coming_back import ComingBack
from memfs.state.journal import INODE, REPLY, Committed, LogJournal, number_in
from memfs.store.conversion import settle
from memfs.store.file import File
from memfs.store.tmpfs_backing import TmpfsBacking
from memfs.tree.access_times import AccessTimes
from memfs.tree.inode import Ino, RegularFile
from memfs.tree.open_files import OpenFiles
from memfs.tree.rebuild import free_forgotten, keep, rebuild
from memfs.tree.tree import Tree

log = logging.getLogger(__name__)

_SIZE: Final = b"s"  # the key of the limit, in pages
_PAGES: Final = struct.Struct("=Q")
_GENERATION: Final = b"G"  # the key of how many processes have served, and of those how many have died
_COUNTS: Final = struct.Struct("=II")
_FORGOTTEN_AFTER: Final = 1.0  # seconds: what the kernel has forgotten it has said by then, or to the predecessor
_AT_ONCE: Final = 16  # inodes that it is asked about


@contextlib.contextmanager
def dying(opened: Opened, worker: Worker) -> Iterator[None]:
    """Have an exception be the death of this process, with nothing taken apart, if another one will go on with it."""
    try:
        yield
    except Exception:
        if worker.is_followed and opened.no_survival is None and opened.mount.is_connected:
            log.critical("a bug in memfs ends the process that serves the mount", exc_info=True)
            os._exit(1)
        raise


class Survival:
    """What becomes of a mount when its workers die. `journal` is None for one that does not survive.

    The parts of the mount are new when this is created, and nobody has used them.
    """

    def __init__(
        self,
        opened: Opened,
        worker: Worker,
        journal: LogJournal | None,
        tree: Tree,
        open_files: OpenFiles,
        page_cache: PageCache,
        access_times: AccessTimes,
        owners: ComingBack,
    ) -> None:
        self._opened: Final = opened
        self._worker: Final = worker
        self._journal: Final = journal
        self._tree: Final = tree
        self._open_files: Final = open_files
        self._page_cache: Final = page_cache
        self._access_times: Final = access_times
        self._owners: Final = owners
        self.outage: float | None = None  #: seconds in which nobody served, before this worker did
        self.generation = 1  #: of the process that serves
        self.restarts = 0  #: how many of those before it have died
        self._remove_others: Callable[[], None] = lambda: None  # that a predecessor was about to free; may take long
        if journal is not None:
            keep(tree, journal)
            journal.keeps(_SIZE, lambda key: _PAGES.pack(opened.backing.total_pages))
            journal.keeps(_GENERATION, lambda key: _COUNTS.pack(self.generation, self.restarts))
            journal.changed(_GENERATION)
            self.size_changed()

    def size_changed(self) -> None:
        """Note that the limit has changed."""
        if self._journal is not None:
            self._journal.changed(_SIZE)

    def take_over(self) -> Before | None:
        """Become what a predecessor was, if there was one."""
        journal, died = self._journal, self._worker.predecessor_died
        if journal is None or died is None:
            return None
        state = journal.load()
        journal.dirty.clear()  # a new tree, in the place of which comes another
        generation, restarts = _COUNTS.unpack(state[_GENERATION])
        self.generation, self.restarts = generation + 1, restarts + (not self._worker.is_upgrade)
        journal.changed(_GENERATION)
        before = {key: state[key] for kind in (INIT, REPLY, TRY) for key in state.of(kind)}
        with garbage.no_collection():  # all of it stays
            self._rebuild(journal, state)
        del state
        journal.commit()
        self.outage = time.monotonic() - died
        more = fields(restarts=self.restarts, outage=self.outage)
        log.warning("%s: going on", self._worker.death, extra=more)
        return Before(before, before[INIT])

    def _rebuild(self, journal: LogJournal, state: Committed) -> None:
        backing = self._opened.backing
        assert isinstance(backing, TmpfsBacking)

        def old_file(ino: Ino, seals: int) -> File:
            return File(backing, ino, seals, journal=journal, exists=True)

        rebuild(self._tree, state, journal, old_file)
        files = [inode.file for inode in self._tree.inodes.values() if isinstance(inode, RegularFile)]
        (total_pages,) = _PAGES.unpack(state[_SIZE])
        backing.recovered(total_pages, sum(file.tracked_pages for file in files))
        settle(state, self._file, journal)
        self._open_files.restore(state)
        self._owners.restore(state)
        if (said := self._opened.mount.access_times()) is not None:
            self._access_times.atime, self._access_times.diratime = said
        for inode in self._open_files.cached:  # nobody knows which of its holes the kernel has read
            self._page_cache.has_read(inode, ByteOffset(0), inode.file.size, inode.uid)
        known = {number_in(key) for key in state.of(INODE)}
        guests = {file.number for file in files if file.guest}
        self._remove_others = backing.remove_others(known, guests, self._tree.next_ino)

    def serves(self) -> None:
        """Take note that from now on this process serves, and no other one will go on from what was there before."""
        assert self._journal is not None
        self._worker.serves()
        self._journal.own()

    def _file(self, number: int) -> File | None:
        inode = self._tree.inodes.find(number)
        return inode.file if isinstance(inode, RegularFile) else None

    async def clear_up(self) -> None:
        """Free what a predecessor was about to free, and inodes that the kernel has forgotten meanwhile."""
        await trio.to_thread.run_sync(self._remove_others)
        await trio.sleep(_FORGOTTEN_AFTER)
        for number, _ in enumerate(free_forgotten(self._tree)):
            self._tree.commit()
            if number % _AT_ONCE == 0:
                await trio.lowlevel.checkpoint()

    async def watch_keeper(self) -> None:
        """Say it when the keeper is gone, if there is one, or leave the mount to the next keeper."""
        if self._worker.keeper is not None:
            await trio.lowlevel.wait_readable(self._worker.keeper)
            self.leave_to_next_keeper()
            log.error("the keeper is gone: if this process is killed, the mount ends")
            self._opened.no_survival = "its keeper is gone"
            self._opened.listener.renew()
            if self._opened.successors is not None:
                self._opened.successors.remove()
                self._opened.successors = None

    def leave_to_next_keeper(self) -> None:
        """End this process, with nothing taken apart, if the keeper is gone and a service manager starts another.

        It ends us then, too, by a signal that asks for the end of the mount otherwise.
        """
        keeper = self._worker.keeper
        if keeper is not None and self._opened.is_stored and select.select([keeper], [], [], 0)[0]:
            log.critical("the keeper is gone: the service manager starts another")
            os._exit(1)
