"""Who owns which file, what they have locked, and how they are told that pages come and go.

Lifetimes
---------
- An **Owner** is one connection, that is, one virtual machine. It is made with the connection and ends with it; its
  number is never used again.
- A **Registration** pairs a file with its one owner (RFC patch 01: memfd_register_guest). It is the file's `owner`
  and holds one reference on the inode, so that an unlinked file lives on until it is released. Registering again
  counts; the last unregister, or the end of the owner, undoes it. Nothing outlives that: its locks are gone, its
  frames are free, and whoever waits for it goes on.

Taking pages away from an owner is three steps, in `Registration.invalidate_begin`: it is told, it acknowledges that
nothing maps the pages, and it has unlocked those it had locked (RFC: get_lock_pfn, put_unlock_pfn). Only then may they
be freed. New locks cannot come in between, because a look-up needs the file's lock and the one who frees holds it.

Who has been told that pages are about to go is told when they are gone, even if it has let go of the file meanwhile:
its faults wait for that. So the two are a pair for the owner as they are for the file.

All three together may take `notify_timeout` seconds. An owner that takes longer is **fenced**: told so, cut off, its
registrations ended, and the operation that waited goes on as if it had never been there. The host must not depend on
a guest's good will.
"""

from __future__ import annotations

import errno
import functools
import logging
import os
import sys
from collections.abc import Awaitable, Callable, Coroutine
from dataclasses import dataclass
from itertools import islice
from typing import Any, Final

import trio

from memfs.contract.faults import Point, reach_at_once
from memfs.contract.frame_numbers import by_order
from memfs.contract.logs import current_request, fields
from memfs.contract.protocol.messages import (
    Ack,
    Fallocate,
    FileId,
    InvalidateBegin,
    InvalidateEnd,
    PfnReply,
    PfnRun,
)
from memfs.contract.units import ByteOffset, PageRange, page_ceil
from memfs.owners.frame_allocator import FileFrames, FrameAllocator
from memfs.owners.page_locks import PageLocks
from memfs.owners.populate import launch
from memfs.store.file import File
from memfs.tree.inode import RegularFile
from memfs.tree.tree import Tree

log = logging.getLogger(__name__)

Notification = InvalidateBegin | InvalidateEnd | Fallocate


Notify = Callable[[Notification, bool], "Ack | Coroutine[Any, Any, Ack | None] | None"]


class OwnerGone(Exception):
    """The owner's connection has ended while something was waiting for it."""


@dataclass(frozen=True, slots=True, eq=False)
class Pending:
    """A notification that the owner has not acknowledged yet. `since`: trio's clock, seconds."""

    message: Notification
    since: float

    @property
    def kind(self) -> str:
        """What it is called."""
        return type(self.message).__name__

    @property
    def age(self) -> float:
        """For how long it has been waiting, in seconds."""
        return trio.current_time() - self.since

    def describe(self) -> dict[str, Any]:
        """For people."""
        message = self.message
        return {
            "notification": self.kind,
            "file": message.file,
            "pages": str(message.pages),
            "request": message.cause,
            "age": round(self.age, 3),
        }


class Registration:
    """One file and its one owner; the file's `GuestOps`."""

    __slots__ = ("_begun", "_tree", "alive", "count", "frames", "id", "inode", "locks", "owner")

    def __init__(self, owner: Owner, tree: Tree, inode: RegularFile, file_id: FileId, frames: FileFrames) -> None:
        self.owner: Final = owner
        self._tree: Final = tree
        self.inode: Final = inode
        self.id: Final = file_id
        self.frames: Final = frames
        self.count = 1  #: how often it was registered
        self.alive = True
        self.locks: Final = PageLocks()
        self._begun = False  # the owner has been told of a beginning, and not yet of its end

    @property
    def file(self) -> File:
        return self.inode.file

    # -- guest_ops: the file tells the owner ------------------------------------------------------------------------

    async def invalidate_begin(self, pages: PageRange) -> None:
        if self.alive:
            self._begun = True  # or it is cut off
            await self._notify(
                InvalidateBegin(self.id, pages, current_request()), Point.BEFORE_BEGIN, Point.AFTER_BEGIN
            )

    async def invalidate_end(self, pages: PageRange) -> None:
        if self._begun:
            self._begun = False
            await self._notify(InvalidateEnd(self.id, pages, current_request()), Point.BEFORE_END, Point.AFTER_END)

    async def fallocate(self, pages: PageRange) -> None:
        if self.alive:
            await self._notify(Fallocate(self.id, pages, current_request()), Point.BEFORE_TELL, Point.AFTER_TELL)

    async def _notify(self, message: Notification, before: Point, after: Point) -> None:
        """Tell the owner, and wait until it has acted; fence it if that takes too long or fails.

        Never raises, and cannot be cancelled: what the owner is told of is done or being done. An owner that answers
        soon is not waited for, so there is then no need of a deadline.
        """
        owner = self.owner
        if not owner.is_connected:
            return
        pending, why = Pending(message, trio.current_time()), None
        self._log("notify", message)
        owner.owes(pending)
        try:
            reach_at_once(before)
            answer = owner.notify(message, owner.is_alone)
            ack = None if isinstance(answer, Coroutine) else answer
            if isinstance(answer, Coroutine) or self._is_locked(message):
                with trio.move_on_after(owner.notify_timeout, shield=True) as scope:
                    if isinstance(answer, Coroutine):
                        ack = await answer
                    if isinstance(message, InvalidateBegin):
                        await self.locks.wait_unlocked(message.pages)
                if scope.cancelled_caught:
                    why = f"no answer within {owner.notify_timeout:g} s"
            reach_at_once(after)
        except OwnerGone:
            return
        except OSError as error:  # an owner that is not told must not go on
            why = f"it could not be told: {error.strerror}"
        except Exception:
            log.exception("a bug in memfs, while %s was being told", owner)
            why = "it could not be told: a bug in memfs"
        finally:
            owner.has_done(pending)
        if why is not None:
            await owner.fence(why)
        elif ack is not None:
            self._acknowledged(pending, ack)

    def _is_locked(self, message: Notification) -> bool:
        """Whether the owner has to unlock pages before they may go."""
        return isinstance(message, InvalidateBegin) and self.locks.any_of(message.pages)

    def _acknowledged(self, pending: Pending, ack: Ack) -> None:
        self.owner.acknowledged += 1
        if log.isEnabledFor(logging.INFO):
            self._log("acknowledged", pending.message, seconds=pending.age)
        if ack.errno:
            reason, pages = os.strerror(ack.errno), pending.message.pages
            log.warning("%s could not act on %s of %s: %s", self.owner, pending.kind, pages, reason)

    def _log(self, what: str, message: Notification, **more: object) -> None:
        if log.isEnabledFor(logging.INFO):
            owner, kind = self.owner.number, type(message).__name__
            said = fields(owner=owner, notification=kind, ino=self.inode.ino, pages=message.pages, **more)
            log.info(what, extra=said)

    # -- guest_mem_ops: the owner asks about pages ------------------------------------------------------------------

    def is_quick(self, pages: PageRange) -> bool:
        """Whether `get_pfn` would not wait for anything."""
        return self.file.is_quick(pages.nbytes)

    async def get_pfn(self, pages: PageRange, *, alloc: bool, lock: bool = True) -> PfnReply:
        """Say which frames the pages that exist (with `alloc`, all) are in, and `lock` them.

        Covers as many pages from the start on as fit into a reply. Raises OSError: EINVAL past the end of the file,
        ENOSPC, ENOLCK if too much is locked already, EBADF if the registration ended meanwhile.
        """
        with self._tree.holding(self.inode):  # the registration may end meanwhile
            async with self.file.locked():
                if not self.alive:
                    raise OSError(errno.EBADF, "unregistered")
                if pages.end > page_ceil(ByteOffset(self.file.size)):
                    raise OSError(errno.EINVAL, "past the end of the file")
                if lock and self.locks.room < PfnReply.MAX_RUNS:
                    raise OSError(errno.ENOLCK, "pages are locked in too many pieces")
                if self.file.guest:
                    launch(self.file)
                if alloc:
                    await self.file.ensure_allocated(pages)
                return self._reply(pages, alloc, lock)

    def _reply(self, pages: PageRange, alloc: bool, lock: bool) -> PfnReply:
        runs = self._runs(pages, alloc)
        for run in runs:
            if lock and run.pfn is not None:
                self.locks.lock(run.pages)
        return PfnReply(self.id, PageRange(pages.start, runs[-1].pages.end), tuple(runs))

    def _runs(self, pages: PageRange, alloc: bool) -> list[PfnRun]:
        runs: list[PfnRun] = []
        for run, is_present in [(pages, True)] if alloc else self.file.allocation_runs(pages):
            if not is_present:
                runs.append(PfnRun(run, None))
            else:
                whole = functools.partial(self._is_whole, known=run)
                runs += [PfnRun(piece, self.frames.pfn(piece.start), order) for piece, order in by_order(run, whole)]
            if len(runs) >= PfnReply.MAX_RUNS:
                break
        return runs[: PfnReply.MAX_RUNS]

    def _is_whole(self, block: PageRange, *, known: PageRange) -> bool:
        """Whether all of a block is allocated. `known` is; of a file without page map nothing else is known."""
        if block.intersect(known) == block:
            return True
        page_map = self.file.page_map
        return page_map is not None and page_map.count(block) == len(block)

    def put_pfn(self, pages: PageRange) -> None:
        """Unlock pages. Raises OSError(EINVAL), changing nothing, if any of them is not locked."""
        self.locks.unlock(pages)

    def describe(self) -> dict[str, Any]:
        """For people."""
        return {
            "file": self.id,
            "ino": self.inode.ino,
            "size": self.file.size,
            "pages": self.file.pages,
            "guest": self.file.guest,
            "locked": len(self.locks),
        }

    def end(self) -> None:
        """The registration is over."""
        self.alive = False
        self.locks.clear()
        self.frames.close()


class Owner:
    """A virtual machine's connection, as the registry sees it.

    `notify` sends a notification and returns its acknowledgement, None if it has none, or a coroutine that waits for
    it; either raises OwnerGone. It is told whether that is the only notification that memfs waits for. `cut_off` ends
    the connection after telling the peer why; the connection's end then calls `Registry.end`. `is_dead` says whether
    the process that connected is gone; a child that it forked may still hold the connection open.
    """

    __slots__ = (
        "_cut_off",
        "_registry",
        "acknowledged",
        "is_dead",
        "name",
        "notify",
        "number",
        "pending",
        "registrations",
    )

    def __init__(
        self,
        number: int,
        registry: Registry,
        notify: Notify,
        cut_off: Callable[[str], Awaitable[None]],
        is_dead: Callable[[], bool],
    ) -> None:
        self.number: Final = number
        self.name = ""  #: what it calls itself, for logs
        self.notify: Final = notify
        self.is_dead: Final = is_dead
        self._cut_off: Final = cut_off
        self._registry: Final = registry
        self.registrations: dict[FileId, Registration] = {}
        self.pending: list[Pending] = []  #: the oldest first
        self.acknowledged = 0  #: how many notifications

    def owes(self, pending: Pending) -> None:
        """It has to acknowledge that, until `has_done`."""
        registry = self._registry
        self.pending.append(pending)
        registry.pending += 1
        registry.waited_for.add(self)
        registry.waiting.set()

    def has_done(self, pending: Pending) -> None:
        """It is not waited for any more, for that."""
        registry = self._registry
        registry.pending -= 1
        self.pending.remove(pending)
        if not self.pending:
            registry.waited_for.remove(self)

    @property
    def is_alone(self) -> bool:
        """Whether nobody else is waited for."""
        return self._registry.pending == 1

    def __str__(self) -> str:
        return f"owner {self.number} ({self.name})" if self.name else f"owner {self.number}"

    def registration(self, file_id: FileId) -> Registration:
        """The registration with a number. Raises OSError(EBADF)."""
        try:
            return self.registrations[file_id]
        except KeyError:
            raise OSError(errno.EBADF, f"no registration {file_id}") from None

    @property
    def is_connected(self) -> bool:
        """Whether it has not ended."""
        return self.number in self._registry.owners

    @property
    def notify_timeout(self) -> float:
        """How long it may take to do what it is told, in seconds."""
        return self._registry.notify_timeout

    async def fence(self, why: str) -> None:
        """Cut it off, unless it has ended. Cannot be cancelled."""
        if self.is_connected:
            with trio.CancelScope(shield=True):
                await self._registry.fence(self, why)

    async def cut_off(self, reason: str) -> None:
        """Tell it why, and end the connection."""
        await self._cut_off(reason)


class Registry:
    """All owners and registrations of a mount. `notify_timeout` in seconds."""

    def __init__(self, tree: Tree, notify_timeout: float = 5.0) -> None:
        self._tree: Final = tree
        self.notify_timeout: Final = notify_timeout
        self.owners: dict[int, Owner] = {}
        self.pending = 0  #: how many notifications have not been acknowledged
        self.waited_for: set[Owner] = set()  #: those who have not acknowledged all of theirs
        self.waiting = trio.Event()  #: set when one is; replaced by who waited for that, when none is
        self.fenced = 0  #: how many owners were cut off for not answering
        self._frames: Final = FrameAllocator()
        self._last_owner = 0
        self._last_file = 0

    def new_owner(
        self,
        notify: Notify,
        cut_off: Callable[[str], Awaitable[None]],
        is_dead: Callable[[], bool] = lambda: False,
    ) -> Owner:
        """A connection has been made."""
        self._last_owner += 1
        owner = self.owners[self._last_owner] = Owner(self._last_owner, self, notify, cut_off, is_dead)
        return owner

    def register(self, owner: Owner, inode: RegularFile) -> Registration:
        """Make a file an owner's. Raises OSError(EPERM) if it is another's. The same again is counted.

        ESHUTDOWN: the owner has ended; a request of its may have waited for the file while it was fenced.
        """
        if not owner.is_connected:
            raise OSError(errno.ESHUTDOWN, "the owner has been cut off")
        current = inode.file.owner
        if isinstance(current, Registration):
            if current.owner is not owner:
                raise OSError(errno.EPERM, "the file has another owner")
            current.count += 1
            return current
        self._last_file += 1
        registration = Registration(owner, self._tree, inode, FileId(self._last_file), FileFrames(self._frames))
        self._tree.hold(inode)
        owner.registrations[registration.id] = registration
        inode.file.bind(registration)
        log.info("registered", extra=fields(owner=owner.number, file=registration.id, ino=inode.ino))
        return registration

    def unregister(self, owner: Owner, file_id: FileId) -> None:
        """Undo one `register`. Raises OSError(EBADF)."""
        registration = owner.registration(file_id)
        registration.count -= 1
        if not registration.count:
            self._end_registration(registration)

    def end(self, owner: Owner) -> None:
        """The owner's connection is gone, and with it all that it had. Idempotent."""
        if self.owners.pop(owner.number, None) is None:
            return
        for registration in list(owner.registrations.values()):
            self._end_registration(registration)

    async def make_way(self, inode: RegularFile, owner: Owner) -> None:
        """End the file's owner if it is another one and its process is gone."""
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
        self._tree.release(registration.inode)

    def describe(self, most: int | None = None) -> list[dict[str, Any]]:
        """Owners, what they have not acknowledged and their files, for people: at most so many of all together."""
        left, owners = sys.maxsize if most is None else most, []
        for owner in self.owners.values():
            if left <= 0:
                break
            pending = [each.describe() for each in owner.pending[: left - 1]]
            files = [each.describe() for each in islice(owner.registrations.values(), left - 1 - len(pending))]
            left -= 1 + len(pending) + len(files)
            owners.append(
                {
                    "owner": owner.number,
                    "name": owner.name,
                    "acknowledged": owner.acknowledged,
                    "files": files,
                    "pending": pending,
                }
            )
        return owners

    def check(self) -> None:
        """Raise AssertionError on the first broken invariant."""
        registered = [r for owner in self.owners.values() for r in owner.registrations.values()]
        for registration in registered:
            assert registration.alive, f"registration {registration.id} has ended"
            assert registration.count > 0, f"registration {registration.id} is counted {registration.count} times"
            assert registration.file.owner is registration, f"registration {registration.id} is not the file's owner"
            assert registration.inode.holds > 0, f"registration {registration.id} does not hold its inode"
            self._tree.inode(registration.inode.ino)
        assert all(owner.pending for owner in self.waited_for), "an owner is waited for that owes nothing"
        owed = sum(len(owner.pending) for owner in self.waited_for)
        assert owed == self.pending, f"{self.pending} notifications are counted, {owed} are owed"
        owned = [inode for inode in self._tree.files() if inode.file.owner is not None]
        assert len(owned) == len(registered), f"{len(owned)} owned files, {len(registered)} registrations"
