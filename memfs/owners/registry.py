"""The registry: which owner has which file, what it has locked, and how it is notified of pages that come and go.

Lifetimes
---------
- An **Owner** is one connection, that is, one virtual machine. It is created with the connection and ends with it; its
  number is never used again. Only the death of the daemon it outlives, if another one follows, with all it has
  (coming_back.py): it is **absent** until a connection of the same user says its token, or `notify_timeout` is over.
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
import json
import logging
from collections.abc import Callable, Hashable, Mapping
from itertools import islice
from typing import Any, Final

from memfs.contract.aio.turns import Turns
from memfs.contract.logs import fields
from memfs.contract.protocol.messages import FileId
from memfs.owners import records
from memfs.owners.absent import Absent
from memfs.owners.coming_back import ComingBack
from memfs.owners.frame_allocator import FrameAllocator
from memfs.owners.outstanding import Outstanding, Pending
from memfs.owners.owner import Owner
from memfs.owners.registration import Registration
from memfs.state.journal import NO_JOURNAL, Journal
from memfs.tree.holdings import Holdings
from memfs.tree.inode import RegularFile
from memfs.tree.tree import Tree

log = logging.getLogger(__name__)

_MOST_SHOWN: Final = 512  # runs of locked pages


class Registry:
    """All owners and registrations of a mount. `notify_timeout` in seconds.

    `given_out` is called with the number of an inode that an owner may change from now on without a request. `journal`
    has what a successor is to know, if there will be one.
    """

    def __init__(
        self,
        tree: Tree,
        notify_timeout: float = 5.0,
        given_out: Callable[[int], None] = lambda ino: None,
        holdings: Holdings | None = None,
        journal: Journal = NO_JOURNAL,
    ) -> None:
        self._tree: Final = tree
        self._journal: Final = journal
        self.registrations: Final[dict[FileId, Registration]] = {}
        self._holdings: Final = holdings or Holdings.of_process()
        self._given_out: Final = given_out
        self.notify_timeout: Final = notify_timeout
        self.owners: dict[int, Owner] = {}
        self.outstanding: Final[Outstanding[Owner]] = Outstanding()
        self.fenced = 0  #: how many owners were cut off for not answering
        self.frames: Final = FrameAllocator()
        self.last_owner = 0
        self.last_file = 0
        self.coming_back: Final = ComingBack(self, tree, journal)

    def enrol(self, owner: Owner, number: int | None = None) -> int:
        """Have an owner, from now until `end`. Returns its number, a new one unless it had one before."""
        if number is None:
            self.last_owner += 1
            self._journal.changed(records.LAST)
            number = self.last_owner
        self.owners[number] = owner
        return number

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
            current.changed()
            return current
        self._journal.check_space()  # for what is written of it
        self._holdings.hold(owner.user, inode.ino, maps=inode.file.is_tracked)
        self.last_file += 1
        registration = Registration(owner, self._tree, inode, FileId(self.last_file), self.frames, self._journal)
        self._add(registration)
        self._journal.changed(records.LAST)
        self._tree.changed(inode)
        self._given_out(inode.ino)
        log.info("registered", extra=fields(owner=owner.number, file=registration.id, ino=inode.ino))
        return registration

    def restore(self, owner: Owner, inode: RegularFile, file: FileId, extents: Mapping[int, int]) -> Registration:
        """Register a file that a predecessor had registered, in the frames that it had. Raises OSError(EMFILE)."""
        registration = Registration(owner, self._tree, inode, file, self.frames, self._journal, extents)
        self._add(registration)
        self._holdings.take(owner.user, inode.ino, maps=inode.file.is_tracked)
        return registration

    def _add(self, registration: Registration) -> None:
        self._tree.hold(registration.inode)
        self.registrations[registration.id] = registration
        registration.owner.registrations[registration.id] = registration
        registration.file.bind(registration)
        registration.changed()

    def unregister(self, owner: Owner, file_id: FileId) -> None:
        """Undo one `register`. Raises OSError(EBADF)."""
        registration = owner.registration(file_id)
        registration.count -= 1
        registration.changed()
        if not registration.count:
            self._end_registration(registration)

    def end(self, owner: Owner) -> None:
        """End an owner whose connection is closed, and with it all that it had. Idempotent."""
        if self.owners.pop(owner.number, None) is None:
            return
        for registration in list(owner.registrations.values()):
            self._end_registration(registration)
        self.coming_back.ended(owner)
        self._tree.commit()

    async def evict_dead(self, inode: RegularFile, owner: Owner) -> None:
        """Fence the file's owner if it is another one and its process is gone. One that is absent is waited for."""
        current = inode.file.owner
        if isinstance(current, Registration) and isinstance(current.owner, Absent):
            await current.owner.settled()
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
        del self.registrations[registration.id]
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
            about = {
                "owner": owner.number,
                "name": owner.name,
                "uid": owner.user,
                "absent": owner.is_absent,
                "acknowledged": owner.acknowledged,
            }
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
        assert len(self.registrations) == len(registered), "registrations of owners that have ended"
        self.coming_back.check()
        owned = [inode for inode in self._tree.files() if inode.file.owner is not None]
        assert len(owned) == len(registered), f"{len(owned)} owned files, {len(registered)} registrations"


def _json_bytes(value: dict[str, Any]) -> int:
    """Return how many bytes something takes in a list in JSON."""
    return len(json.dumps(value)) + len(", ")
