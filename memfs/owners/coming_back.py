"""Owners that outlive the daemon: what is written down of them, and how they come back to its successor.

An owner gets a token in HelloReply, if there will be a successor. That has the owner, absent (absent.py), with its
registrations, locks and frame numbers, and waits `notify_timeout` seconds, in which it runs itself, for a connection
that says the token. It is an owner's name, and whoever knows it has the guest's memory: so it cannot be guessed, is not
shown to anybody, and is good for connections of the same user only.

What had begun for it, its end of the connection ends (client.py); the kernel asks again for what was not answered, and
that begins anew when the owner is back.
"""

from __future__ import annotations

import errno
import logging
import secrets
from collections.abc import Mapping
from typing import TYPE_CHECKING, Final

import trio

from memfs.contract.aio.deadlines import Deadlines
from memfs.contract.aio.turns import Turns
from memfs.contract.logs import fields
from memfs.contract.protocol.messages import FileId, Token
from memfs.contract.protocol.wire import TOKEN_SIZE
from memfs.owners import records
from memfs.owners.absent import Absent
from memfs.owners.answers import Answers
from memfs.owners.owner import UNITS_TO_END, Owner
from memfs.owners.registration import Registration
from memfs.state.journal import Committed, Journal, number_in, numbered, rest_of
from memfs.tree.tree import Tree

if TYPE_CHECKING:
    from memfs.owners.registry import Registry

log = logging.getLogger(__name__)


class ComingBack:
    """The owners of a registry that outlive the daemon, if it has a journal for them."""

    def __init__(self, registry: Registry, tree: Tree, journal: Journal) -> None:
        self._registry: Final = registry
        self._tree: Final = tree
        self._journal: Final = journal
        self._absent: Final[dict[Token, Absent]] = {}
        self._settled: Final = trio.lowlevel.ParkingLot()
        journal.keeps(records.OWNER, self._owner_value)
        journal.keeps(records.REGISTRATION, self._registration_value)
        journal.keeps(records.EXTENT, self._extent_value)
        journal.keeps(records.LOCKS, self._locks_value)
        journal.keeps(records.ANSWER, self._answer_value)
        journal.keeps(records.LAST, lambda key: records.pack_last(registry.last_owner, registry.last_file))

    # -- what is written down ---------------------------------------------------------------------------------------

    def _owner_value(self, key: bytes) -> bytes | None:
        owner = self._registry.owners.get(number_in(key))
        if owner is None or owner.last_answers is None:
            return None
        assert isinstance(owner.user, int), "an owner that comes back is a user's"
        return records.pack_owner(owner.token, owner.user, owner.name)

    def _registration_of(self, key: bytes) -> Registration | None:
        return self._registry.registrations.get(FileId(number_in(key)))

    def _registration_value(self, key: bytes) -> bytes | None:
        each = self._registration_of(key)
        if each is None:
            return None
        return records.pack_registration(each.owner.number, each.inode.ino, each.count, preserves=each.preserves)

    def _extent_value(self, key: bytes) -> bytes | None:
        each = self._registration_of(key)
        extent = each.frames.extents.get(records.number_of(rest_of(key))) if each is not None else None
        return records.pack_extent(extent) if extent is not None else None

    def _locks_value(self, key: bytes) -> bytes | None:
        each = self._registration_of(key)
        count = each.locks.count_at(records.number_of(rest_of(key))) if each is not None else None
        return records.pack_count(count) if count is not None else None

    def _answer_value(self, key: bytes) -> bytes | None:
        owner = self._registry.owners.get(number_in(key))
        return owner.last_answers.value(rest_of(key)) if owner is not None and owner.last_answers is not None else None

    @property
    def keys(self) -> set[bytes]:
        """The keys of all that there is."""
        found: set[bytes] = set()
        for owner in self._registry.owners.values():
            if owner.last_answers is not None:
                found |= {numbered(records.OWNER, owner.number), *owner.last_answers.all_keys}
        for registration in self._registry.registrations.values():
            found |= {numbered(records.REGISTRATION, registration.id), *registration.keys()}
        return found

    # -- owners of this daemon --------------------------------------------------------------------------------------

    def greet(self, owner: Owner) -> None:
        """Give a new owner a token, if there will be a successor. Raises OSError(ENOSPC)."""
        if self._journal.is_kept:
            self._journal.check_space()
            owner.token = Token(secrets.token_bytes(TOKEN_SIZE))
            owner.last_answers = Answers(self._journal, owner.number)
            self._journal.changed(records.OWNER, owner.number)

    def ended(self, owner: Owner) -> None:
        """Forget an owner that has ended."""
        if owner.last_answers is not None:
            self._journal.drop(iter(owner.last_answers.all_keys))
            self._journal.changed(records.OWNER, owner.number)
        if self._absent.pop(owner.token, None) is not None:
            self._settle(owner, None)

    def _settle(self, owner: Owner, successor: Owner | None) -> None:
        assert isinstance(owner, Absent), f"{owner} was not absent"
        owner.settle(successor)
        if not self._absent:
            self._settled.unpark_all()

    # -- owners of a predecessor ------------------------------------------------------------------------------------

    def resume(self, owner: Owner, token: Token) -> None:
        """Have a connection be the owner whose token it says. Raises OSError(ESTALE) if there is none, or not its."""
        absent = self._absent.get(token)
        if absent is None or absent.user != owner.user:
            raise OSError(errno.ESTALE, "no such owner, or not any more: its registrations have ended")
        del self._absent[token], self._registry.owners[owner.number]
        log.info("back", extra=fields(owner=absent.number, connection=owner.number))
        owner.number, owner.token, owner.last_answers = absent.number, token, absent.last_answers
        owner.registrations = absent.registrations
        for registration in owner.registrations.values():
            registration.owner = owner
        self._registry.owners[owner.number] = owner
        self._journal.changed(records.OWNER, owner.number)
        self._settle(absent, owner)

    def restore(self, state: Committed) -> None:
        """Have the owners that a predecessor has written down, absent, with all that they had."""
        self._registry.last_owner, self._registry.last_file = records.unpack_last(state.get(records.LAST, bytes(16)))
        owners: dict[int, Absent] = {}
        saved: dict[FileId, records.SavedRegistration] = {}
        extents: dict[FileId, dict[int, int]] = {}
        locks: dict[FileId, dict[int, int]] = {}
        for key, value in state.items_of(records.OWNER):
            absent = owners[number_in(key)] = self._absent_one(number_in(key), records.unpack_owner(value))
            self._absent[absent.token] = absent
        for key, value in state.items_of(records.REGISTRATION):
            saved[FileId(number_in(key))] = records.unpack_registration(value)
        for key, value in state.items_of(records.EXTENT):
            of_file = extents.setdefault(FileId(number_in(key)), {})
            of_file[records.number_of(rest_of(key))] = records.unpack_extent(value)
        for key, value in state.items_of(records.LOCKS):
            of_file = locks.setdefault(FileId(number_in(key)), {})
            of_file[records.number_of(rest_of(key))] = records.unpack_count(value)
        for key, value in state.items_of(records.ANSWER):
            if (of := owners.get(number_in(key))) is not None and of.last_answers is not None:
                of.last_answers.restore(rest_of(key), value)
        for file, each in saved.items():
            self._restore(file, each, owners[each.owner], extents.get(file, {}), locks.get(file, {}))
        there = self._registry.registrations
        self._registry.frames.restore(extent for each in there.values() for extent in each.frames.extents.values())
        parts = [*state.of(records.EXTENT), *state.of(records.LOCKS)]
        gone = [key for key in parts if FileId(number_in(key)) not in there]
        gone += [key for key in state.of(records.ANSWER) if number_in(key) not in owners]
        self._journal.drop(iter(gone))  # a predecessor has not come to that

    def _absent_one(self, number: int, saved: records.SavedOwner) -> Absent:
        absent = Absent(self._registry, number)
        absent.token, absent.user, absent.name = saved.token, saved.uid, saved.name
        absent.last_answers = Answers(self._journal, number)
        return absent

    def _restore(
        self,
        file: FileId,
        saved: records.SavedRegistration,
        owner: Absent,
        extents: Mapping[int, int],
        locks: Mapping[int, int],
    ) -> None:
        """Have a registration. Where that fails, for want of a descriptor, its owner hears that it does not exist."""
        inode = self._tree.regular(saved.ino)
        try:
            registration = self._registry.restore(owner, inode, file, extents)
        except OSError as error:
            log.error("%s cannot come back: inode %d: %s", owner, saved.ino, error.strerror)  # noqa: TRY400
            self._journal.changed(records.REGISTRATION, file)
            return
        registration.count, registration.preserves = saved.times, saved.preserves
        registration.locks.restore(locks)

    async def wait(self) -> None:
        """Wait until those who are absent are back, and fence those who are not after `notify_timeout`."""
        timeout = self._registry.notify_timeout
        try:
            with Deadlines.here().fail_after(timeout):
                while self._absent:
                    await self._settled.park()
        except trio.TooSlowError:
            why = f"memfs was killed, and it did not come back within {timeout:g} s"
            for absent in list(self._absent.values()):
                await Turns.here().take(absent.user, UNITS_TO_END)
                if absent.is_absent:
                    await self._registry.fence(absent, why)

    def give_up(self) -> None:
        """Wait for nobody any more: all who are absent end."""
        for absent in list(self._absent.values()):
            self._registry.end(absent)

    def check(self) -> None:
        """Raise AssertionError on the first broken invariant."""
        for token, absent in self._absent.items():
            assert absent.token == token, f"{absent} is known by another token"
            assert self._registry.owners.get(absent.number) is absent, f"{absent} has ended"
