"""An owner: one connection, that is, one virtual machine, as the registry sees it, and how it is notified.

A notification is sent, and whoever notifies waits until the owner has acted and has unlocked what it had locked of the
pages that go. An owner that takes too long, or cannot be notified, is fenced, and the operation goes on as if it had
never been there (registry.py).
"""

from __future__ import annotations

import errno
import logging
import os
from abc import ABC, abstractmethod
from collections.abc import Collection, Hashable
from typing import TYPE_CHECKING, Final, Protocol

import trio

from memfs.contract.aio.deadlines import Deadlines
from memfs.contract.logs import current_caller, current_request, fields
from memfs.contract.page_ranges import PageRanges
from memfs.contract.protocol.call import Incoming, PeerGone
from memfs.contract.protocol.connection import is_answered
from memfs.contract.protocol.messages import NO_TOKEN, Ack, ConvertBegin, ConvertEnd, FileId, Notification
from memfs.contract.units import PageRange
from memfs.owners.answers import Answers
from memfs.owners.outstanding import Outstanding, Pending
from memfs.owners.page_locks import PageLocks

if TYPE_CHECKING:
    from memfs.owners.registration import Registration
    from memfs.owners.registry import Registry

log = logging.getLogger(__name__)

UNITS_TO_END: Final = 4  #: of work that the end of one is (contract/aio/turns.py)


class Unlocked:
    """That none of some pages is locked by their owner."""

    __slots__ = ("_locks", "_ranges")

    def __init__(self, locks: PageLocks, ranges: Collection[PageRange] | PageRanges) -> None:
        self._locks: Final = locks
        self._ranges: Final = ranges

    @property
    def is_so(self) -> bool:
        """Whether none is, now."""
        return not len(self._locks) or not any(map(self._locks.any_of, self._ranges))

    @property
    def first(self) -> PageRange | None:
        """The first range of pages that are locked, now."""
        return next((locked for pages in self._ranges if (locked := self._locks.first_of(pages)) is not None), None)

    async def wait(self) -> None:
        """Wait until none is."""
        while not self.is_so:
            for pages in self._ranges:
                await self._locks.wait_unlocked(pages)


class Answer(Protocol):
    """What comes of a notification (a `peer.Call`)."""

    is_done: bool  #: whether the acknowledgement is there, or there is to be none and the notification is sent
    reply: Incoming | None  #: the acknowledgement

    def poll(self) -> None:
        """Busy-poll for it."""

    async def wait(self) -> None:
        """Wait until it is done. Raises PeerGone."""


class Owner(ABC):
    """A virtual machine's connection: its registrations, and how to talk to it.

    One that had a number before, and so is known by that, gets it.
    """

    def __init__(self, registry: Registry, number: int | None = None) -> None:
        self._registry: Final = registry
        self.number = registry.enrol(self, number)
        self.token = NO_TOKEN  #: with which it can come back; never shown to anybody else
        self.last_answers: Answers | None = None  #: what it is to be told again if it asks again
        self.name = ""  #: what it calls itself, for logs
        self.user: Hashable = None  #: whose turn it takes
        self.registrations: dict[FileId, Registration] = {}
        self.acknowledged = 0  #: how many notifications

    @abstractmethod
    def notify(self, message: Notification) -> Answer:
        """Send a notification, without waiting. Raises PeerGone, OSError."""

    @abstractmethod
    async def cut_off(self, reason: str) -> None:
        """Tell it why, if that can be done soon, and end the connection, which calls `Registry.end`."""

    @abstractmethod
    def has_thread(self, number: int) -> bool:
        """Return whether a thread is one of the process that connected."""

    @abstractmethod
    def is_stopped(self) -> bool:
        """Return whether the process that connected is stopped, by a signal or a debugger."""

    @abstractmethod
    def is_dead(self) -> bool:
        """Return whether the process that connected is gone; a child may still hold the connection open."""

    def __str__(self) -> str:
        return f"owner {self.number} ({self.name})" if self.name else f"owner {self.number}"

    def registration(self, file_id: FileId) -> Registration:
        """Return the registration with a number. Raises OSError(EBADF)."""
        try:
            return self.registrations[file_id]
        except KeyError:
            raise OSError(errno.EBADF, f"no registration {file_id}") from None

    @property
    def is_connected(self) -> bool:
        """Whether it has not ended."""
        return self.number in self._registry.owners

    @property
    def is_absent(self) -> bool:
        """Whether it has yet to come back."""
        return False

    @property
    def notify_timeout(self) -> float:
        """How long it may take to act on a notification, in seconds."""
        return self._registry.notify_timeout

    @property
    def outstanding(self) -> Outstanding[Owner]:
        """The ledger of notifications, of all owners."""
        return self._registry.outstanding

    async def fence(self, why: str) -> None:
        """Cut it off, unless it has ended. Cannot be cancelled."""
        if self.is_connected:
            with trio.CancelScope(shield=True):
                await self._registry.fence(self, why)

    # -- guest_ops of two files: conversions ------------------------------------------------------------------------

    async def convert_begin(self, shared: FileId, private: FileId, ranges: PageRanges, *, to_private: bool) -> None:
        """Have it unmap pages that are about to leave one of its files for the other, and unlock them.

        One of the two may be NO_FILE. Cannot be cancelled.
        """
        message = ConvertBegin(shared, private, to_private, ranges, current_request())
        left = self.registrations.get(shared if to_private else private)
        await self.tell(message, None, Unlocked(left.locks, ranges) if left is not None else None)

    async def convert_end(self, shared: FileId, private: FileId, done: PageRanges, *, to_private: bool) -> None:
        """Tell it that the conversion that began is over, and which pages are on the wanted side now."""
        left = self.registrations.get(shared if to_private else private)
        if left is not None:
            left.conversions += 1
        message = ConvertEnd(shared, private, to_private, done, current_request())
        await self.tell(message)

    # -- notifying --------------------------------------------------------------------------------------------------

    async def tell(self, message: Notification, ino: int | None = None, unlocked: Unlocked | None = None) -> None:
        """Notify it, and wait until it has acted, and has unlocked pages; fence it if that takes too long or fails.

        `ino` names the file in logs. Never raises, and cannot be cancelled: what it is notified of is done or being
        done.
        """
        if not self.is_connected:
            return
        if log.isEnabledFor(logging.INFO):
            self._log("notify", message, ino)
        why: str | None = None
        pending = self.outstanding.of(self, message)
        try:
            ack = self._ack(message, await self._answer(pending, unlocked))
        except PeerGone:
            return
        except trio.TooSlowError as error:
            why = str(error)
        except OSError as error:  # an owner that is not notified must not go on
            why = f"it could not be notified: {error.strerror}"
        except Exception:
            log.exception("a bug in memfs, while %s was being notified", self)
            why = "it could not be notified: a bug in memfs"
        finally:
            self.outstanding.count(pending)
        if why is not None:
            await self.fence(why)
        elif ack is not None:
            self._acknowledged(pending, ack, ino)

    async def _answer(self, pending: Pending[Owner], unlocked: Unlocked | None) -> Answer:
        """Notify it and return its answer, when that is done and no page is locked any more.

        An owner that answers soon is not waited for, so there is then no need of a deadline, and nobody sees it owe
        anything. Raises PeerGone, trio.TooSlowError, which says what is known of why, OSError.
        """
        answer = self._post(pending.message)
        if not answer.is_done and self.outstanding.is_recent:
            answer.poll()
        if answer.is_done and (unlocked is None or unlocked.is_so):
            await answer.wait()  # only says so if it is done because the owner is gone
        else:
            try:
                with pending, Deadlines.here().fail_after(self.notify_timeout):
                    await answer.wait()
                    if unlocked is not None:
                        await unlocked.wait()
            except trio.TooSlowError:
                raise trio.TooSlowError(self._why_late(answer, unlocked)) from None
        return answer

    def _why_late(self, answer: Answer, unlocked: Unlocked | None) -> str:
        """Return what it has not done in time, and what is known of why."""
        why = f"no answer within {self.notify_timeout:g} s"
        if answer.is_done and unlocked is not None and (locked := unlocked.first) is not None:
            why = f"it answered, but its pages {locked} stayed locked for {self.notify_timeout:g} s"
        if self.is_stopped():
            return f"{why}: its process is stopped"
        if (caller := current_caller()) and self.has_thread(caller):
            return f"{why}; the file call that waits for it is made by thread {caller} of its own process"
        return why

    def _post(self, message: Notification) -> Answer:
        return self.notify(message)

    def _ack(self, message: Notification, answer: Answer) -> Ack | None:
        """Return the acknowledgement of a notification, if there is one."""
        if answer.reply is None:
            assert not is_answered(message), f"{message} was not acknowledged"
            return None
        assert isinstance(answer.reply.message, Ack), f"the protocol let {answer.reply.message} through"
        return answer.reply.message

    def _acknowledged(self, pending: Pending[Owner], ack: Ack, ino: int | None) -> None:
        self.acknowledged += 1
        if log.isEnabledFor(logging.INFO):
            self._log("acknowledged", pending.message, ino, seconds=pending.age)
        if ack.errno:
            reason, pages = os.strerror(ack.errno), pending.message.subject["pages"]
            log.warning("%s could not act on %s of %s: %s", self, pending.kind, pages, reason)

    def _log(self, what: str, message: Notification, ino: int | None, **more: object) -> None:
        about = message.subject if ino is None else {"ino": ino, "pages": message.subject["pages"]}
        log.info(what, extra=fields(owner=self.number, notification=type(message).__name__, **about, **more))
