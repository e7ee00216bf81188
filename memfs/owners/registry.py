"""The registry: which owner has which file, what it has locked, and how it is notified of pages that come and go.

Lifetimes
---------
- An **Owner** is one connection, that is, one virtual machine. It is created with the connection and ends with it; its
  number is never used again.
- A **Registration** pairs a file with its one owner (RFC patch 01: memfd_register_guest). It is the file's `owner`
  and holds one reference on the inode, so that an unlinked file lives on until it is released. Registering again
  counts; the last unregister, or the end of the owner, undoes it. Nothing outlives that: its locks are undone, its
  frames are free, and operations that wait for it go on.

Pages of an owner are freed after three steps, in `Owner.tell`: the owner is notified, it
acknowledges that nothing maps the pages, and it has unlocked those that it had locked (RFC: get_lock_pfn,
put_unlock_pfn). New locks cannot come in between: a look-up needs the file's lock, which the operation that frees has.

InvalidateBegin is always followed by InvalidateEnd, even if the owner unregisters the file in between, for its faults
wait for that. So the two are a pair for the owner as they are for the file.

All three steps together may take `notify_timeout` seconds in which the daemon itself runs (aio/deadlines.py). An owner
that takes longer is **fenced**: it is sent the reason, it is disconnected, its registrations end, and the operation
that waited goes on as if it had never been there. The host must not depend on a guest's good will.
"""

from __future__ import annotations

import errno
import functools
import json
import logging
from collections.abc import Callable, Hashable, Iterator
from itertools import islice
from typing import Any, Final

from memfs.contract.aio.turns import SHARE, Turns
from memfs.contract.frame_numbers import by_order, cut_at
from memfs.contract.logs import current_request, fields
from memfs.contract.protocol.messages import (
    Fallocate,
    FileId,
    InvalidateBegin,
    InvalidateEnd,
    PfnReply,
    PfnRun,
)
from memfs.contract.units import ORDER_1G, PAGE_SIZE, ByteOffset, PageRange, order_of, page_ceil
from memfs.owners.frame_allocator import FileFrames, FrameAllocator
from memfs.owners.outstanding import Outstanding, Pending
from memfs.owners.owner import Owner, Unlocked
from memfs.owners.page_locks import PageLocks
from memfs.owners.populate import launch
from memfs.store.file import File
from memfs.tree.holdings import Holdings
from memfs.tree.inode import RegularFile
from memfs.tree.tree import Tree

log = logging.getLogger(__name__)

_MOST_RUNS: Final = 128  # in one reply: a share of work
_MOST_SHOWN: Final = 512  # runs of locked pages
_MOST_PAGES: Final = 1 << 20  # looked at for one reply: a quarter of a share


class Registration:
    """One file and its one owner; the file's `GuestOps`."""

    __slots__ = (
        "_begun",
        "_tree",
        "alive",
        "conversions",
        "count",
        "frames",
        "id",
        "inode",
        "locks",
        "owner",
        "preserves",
    )

    def __init__(self, owner: Owner, tree: Tree, inode: RegularFile, file_id: FileId, frames: FileFrames) -> None:
        self.owner: Final = owner
        self._tree: Final = tree
        self.inode: Final = inode
        self.id: Final = file_id
        self.frames: Final = frames
        self.count = 1  #: how often it was registered
        self.alive = True
        self.locks: Final = PageLocks()
        self.preserves = False  #: whether conversions may keep the content of pages
        self.conversions = 0  #: how many have taken pages away
        self._begun = False  # the owner has been notified of a beginning, and not yet of its end

    @property
    def file(self) -> File:
        """The file of the inode."""
        return self.inode.file

    def _about(self, pages: PageRange) -> dict[str, object]:
        return {"ino": self.inode.ino, "pages": pages}

    # -- guest_ops: the file notifies the owner ---------------------------------------------------------------------

    async def invalidate_begin(self, pages: PageRange) -> None:
        """Have the owner unmap pages and unlock them."""
        if self.alive:
            self._begun = True  # or it is fenced
            message = InvalidateBegin(self.id, pages, current_request())
            await self.owner.tell(message, self._about(pages), Unlocked(self.locks, (pages,)))

    async def invalidate_end(self, pages: PageRange) -> None:
        """Tell the owner that the invalidation that began is over."""
        if self._begun:
            self._begun = False
            await self.owner.tell(InvalidateEnd(self.id, pages, current_request()), self._about(pages))

    async def fallocate(self, pages: PageRange) -> None:
        """Tell the owner that pages are allocated."""
        if self.alive:
            await self.owner.tell(Fallocate(self.id, pages, current_request()), self._about(pages))

    # -- guest_mem_ops: the owner asks about pages ------------------------------------------------------------------

    async def get_pfn(self, pages: PageRange, *, alloc: bool, lock: bool = True) -> PfnReply:
        """Return which frames the pages that exist (with `alloc`, all) are in, and `lock` them.

        Covers as many pages from the start on as a turn of the event loop allows. Nothing is allocated if a conversion
        came in between: the owner asked before it knew, and what has just become private would be paid for twice.
        Raises OSError: EINVAL past the end of the file, ENOSPC, ENOLCK if too much is locked already, EBADF if the
        registration ended meanwhile.
        """
        asked, turns, conversions = pages, Turns.here(), self.conversions
        pages = next(asked.chunks(_MOST_PAGES))
        with self._tree.holding(self.inode):  # the registration may end meanwhile
            async with self.file.locked():
                await turns.take(self.owner.user)  # many may have waited for the lock
                if not self.alive:
                    raise OSError(errno.EBADF, "unregistered")
                if asked.end > page_ceil(ByteOffset(self.file.size)):
                    raise OSError(errno.EINVAL, "past the end of the file")
                if lock and self.locks.headroom < _MOST_RUNS:
                    raise OSError(errno.ENOLCK, "pages are locked in too many ranges")
                if self.file.guest:
                    launch(self.file)
                alloc = alloc and self.conversions == conversions
                if alloc:
                    await self.file.ensure_allocated(pages)
                reply = self._reply(pages, alloc, lock)
        turns.spend(self.owner.user, len(reply.runs) * SHARE // _MOST_RUNS)
        return reply

    def _reply(self, pages: PageRange, alloc: bool, lock: bool) -> PfnReply:
        runs = self._runs(pages, alloc)
        if lock:
            self.locks.lock(*(run.pages for run in runs if run.pfn is not None))
        return PfnReply(self.id, PageRange(pages.start, runs[-1].pages.end), tuple(runs))

    def _runs(self, pages: PageRange, alloc: bool) -> list[PfnRun]:
        return list(islice(self._all_runs(pages, alloc), _MOST_RUNS))

    def _all_runs(self, asked: PageRange, alloc: bool) -> Iterator[PfnRun]:
        for run, is_present in [(asked, True)] if alloc else self.file.allocation_runs(asked):
            if is_present:
                for part, order in self._by_order(run, asked):
                    yield PfnRun(part, self.frames.pfn(part.start), order)
            else:
                yield PfnRun(run, None)

    def _by_order(self, run: PageRange, asked: PageRange) -> Iterator[tuple[PageRange, int]]:
        """Cut a run of allocated pages into parts of one extent and one order."""
        if self.file.granule > PAGE_SIZE:  # what there is of it are whole huge pages
            order = order_of(self.file.granule)
            return ((part, order) for part in cut_at(run, ORDER_1G))
        return by_order(run, functools.partial(self._is_whole, run, asked))

    def _is_whole(self, run: PageRange, asked: PageRange, block: PageRange) -> bool:
        """Return whether all of a block is allocated, as `run` is, with absent pages around it within `asked`.

        Of a file without a page map nothing else is known.
        """
        if block.start < run.start != asked.start or block.end > run.end != asked.end:
            return False
        if run.start <= block.start and block.end <= run.end:
            return True
        page_map = self.file.page_map
        return page_map is not None and page_map.count(block) == len(block)

    def put_pfn(self, pages: PageRange) -> None:
        """Unlock pages. Raises OSError(EINVAL), changing nothing, if any of them is not locked."""
        self.locks.unlock(pages)

    def allow_preserve(self) -> None:
        """Let conversions keep the content of pages. Raises OSError(EINVAL) if the file is not guest-sealed."""
        if not self.file.guest:
            raise OSError(errno.EINVAL, "not guest-sealed")
        self.preserves = True

    def describe(self) -> dict[str, Any]:
        """Return what people want to know of it, or wanted to if it has ended."""
        return {
            "file": self.id,
            "ino": self.inode.ino,
            "size": self.file.size if self.alive else 0,
            "pages": self.file.pages if self.alive else 0,
            "guest": self.file.guest,
            "locked": len(self.locks),
        }

    def end(self) -> None:
        """Release what the registration holds."""
        self.alive = False
        self.locks.clear()
        self.frames.close()


class Registry:
    """All owners and registrations of a mount. `notify_timeout` in seconds.

    `given_out` is called with the number of an inode that an owner may change from now on without a request.
    """

    def __init__(
        self,
        tree: Tree,
        notify_timeout: float = 5.0,
        given_out: Callable[[int], None] = lambda ino: None,
        holdings: Holdings | None = None,
    ) -> None:
        self._tree: Final = tree
        self._holdings: Final = holdings or Holdings.of_process()
        self._given_out: Final = given_out
        self.notify_timeout: Final = notify_timeout
        self.owners: dict[int, Owner] = {}
        self.outstanding: Final[Outstanding[Owner]] = Outstanding()
        self.fenced = 0  #: how many owners were cut off for not answering
        self._frames: Final = FrameAllocator()
        self._last_owner = 0
        self._last_file = 0

    def enrol(self, owner: Owner) -> int:
        """Have an owner, from now until `end`. Returns its number."""
        self._last_owner += 1
        self.owners[self._last_owner] = owner
        return self._last_owner

    def register(self, owner: Owner, inode: RegularFile) -> Registration:
        """Register a file for an owner, or count it once more. Raises OSError(EPERM) if it is another's.

        EMFILE: its user has its share of files (tree/holdings.py). ESHUTDOWN: the owner has ended; a request of its may
        have waited for the file while it was fenced.
        """
        if not owner.is_connected:
            raise OSError(errno.ESHUTDOWN, "the owner has been cut off")
        current = inode.file.owner
        if isinstance(current, Registration):
            if current.owner is not owner:
                raise OSError(errno.EPERM, "the file has another owner")
            current.count += 1
            return current
        self._holdings.hold(owner.user, inode.ino, maps=inode.file.is_tracked)
        self._last_file += 1
        registration = Registration(owner, self._tree, inode, FileId(self._last_file), FileFrames(self._frames))
        self._tree.hold(inode)
        owner.registrations[registration.id] = registration
        inode.file.bind(registration)
        self._tree.changed(inode)
        self._given_out(inode.ino)
        log.info("registered", extra=fields(owner=owner.number, file=registration.id, ino=inode.ino))
        return registration

    def unregister(self, owner: Owner, file_id: FileId) -> None:
        """Undo one `register`. Raises OSError(EBADF)."""
        registration = owner.registration(file_id)
        registration.count -= 1
        if not registration.count:
            self._end_registration(registration)

    def end(self, owner: Owner) -> None:
        """End an owner whose connection is closed, and with it all that it had. Idempotent."""
        if self.owners.pop(owner.number, None) is None:
            return
        for registration in list(owner.registrations.values()):
            self._end_registration(registration)
        self._tree.commit()

    async def evict_dead(self, inode: RegularFile, owner: Owner) -> None:
        """Fence the file's owner if it is another one and its process is gone."""
        current = inode.file.owner
        if isinstance(current, Registration) and current.owner is not owner and current.owner.is_dead():
            await self.fence(current.owner, "its process is gone")

    async def fence(self, owner: Owner, reason: str) -> None:
        """Cut off an owner that does not answer."""
        log.error("%s is fenced: %s", owner, reason)
        self.fenced += 1
        self.end(owner)
        await owner.cut_off(reason)

    def _end_registration(self, registration: Registration) -> None:
        log.info("unregistered", extra=fields(owner=registration.owner.number, file=registration.id))
        del registration.owner.registrations[registration.id]
        registration.file.unbind()
        registration.end()
        self._holdings.release(registration.owner.user, registration.inode.ino)
        self._tree.release(registration.inode)

    async def describe(
        self, most_bytes: int, user: Hashable, sees: Callable[[Owner], bool] = lambda owner: True
    ) -> list[dict[str, Any]]:
        """Return owners, what they have not acknowledged and their files, as many as fit into so many bytes of JSON.

        Takes as many turns of a user's as there is to describe. `sees` says which owners are shown.
        """
        turns, left, owners = Turns.here(), most_bytes, list[dict[str, Any]]()
        for owner in list(self.owners.values()):
            await turns.take(user)
            if not sees(owner):
                continue
            files, pending = list[dict[str, Any]](), list[dict[str, Any]]()
            about = {"owner": owner.number, "name": owner.name, "uid": owner.user, "acknowledged": owner.acknowledged}
            described = {**about, "files": files, "pending": pending}
            left -= _json_bytes(described)
            if left < 0:
                break
            owners.append(described)
            unacknowledged, registrations = list(self.outstanding.by(owner)), list(owner.registrations.values())
            both: list[Pending[Owner] | Registration] = [*unacknowledged, *registrations]
            for each in both:
                await turns.take(user)
                one = each.describe()
                left -= _json_bytes(one)
                if left < 0:
                    return owners
                (files if isinstance(each, Registration) else pending).append(one)
        return owners

    def describe_locks(self, inode: RegularFile) -> dict[str, Any]:
        """Return who has a file, and which of its pages are locked: the first so many runs of them."""
        registration = inode.file.owner
        if not isinstance(registration, Registration):
            return {"owner": None, "locked": 0, "runs": []}
        runs = [[run.start, run.end] for run in islice(registration.locks.runs(), _MOST_SHOWN)]
        return {"owner": registration.owner.number, "locked": len(registration.locks), "runs": runs}

    def check(self) -> None:
        """Raise AssertionError on the first broken invariant."""
        registered = [r for owner in self.owners.values() for r in owner.registrations.values()]
        for registration in registered:
            assert registration.alive, f"registration {registration.id} has ended"
            assert registration.count > 0, f"registration {registration.id} is counted {registration.count} times"
            assert registration.file.owner is registration, f"registration {registration.id} is not the file's owner"
            assert registration.inode.holds > 0, f"registration {registration.id} does not hold its inode"
            self._tree.inode(registration.inode.ino)
        self.outstanding.check()
        owned = [inode for inode in self._tree.files() if inode.file.owner is not None]
        assert len(owned) == len(registered), f"{len(owned)} owned files, {len(registered)} registrations"


def _json_bytes(value: dict[str, Any]) -> int:
    """Return how many bytes something takes in a list in JSON."""
    return len(json.dumps(value)) + len(", ")
