"""The ledger of notifications that owners have not acknowledged yet."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final, Generic, TypeVar

import trio

from memfs.contract.protocol.messages import ConvertBegin, ConvertEnd, Notification
from memfs.owners.tally import Tally

_Owner = TypeVar("_Owner")

_CONVERSIONS: Final = (ConvertBegin, ConvertEnd)
_MOMENT: Final = 1e-3  # seconds: a share of the event loop


class Pending(Generic[_Owner]):
    """A notification that is outstanding within a `with` block. Created by `Outstanding.of`."""

    __slots__ = ("_outstanding", "message", "owner", "since")

    def __init__(self, outstanding: Outstanding[_Owner], owner: _Owner, message: Notification) -> None:
        self._outstanding: Final = outstanding
        self.owner: Final = owner
        self.message: Final = message
        self.since: Final = trio.current_time()  #: seconds

    def __enter__(self) -> Pending[_Owner]:
        self._outstanding.add(self)
        return self

    def __exit__(self, *_: object) -> None:
        self._outstanding.remove(self)

    @property
    def kind(self) -> str:
        """What it is called."""
        return type(self.message).__name__

    @property
    def tallied(self) -> str:
        """What it is counted as: its kind, and of a conversion also where to."""
        message = self.message
        if isinstance(message, _CONVERSIONS):
            return f"{self.kind} to {'private' if message.to_private else 'shared'}"
        return self.kind

    @property
    def page_count(self) -> int:
        """How many pages it is about."""
        message = self.message
        return message.ranges.pages if isinstance(message, _CONVERSIONS) else len(message.pages)

    @property
    def age(self) -> float:
        """For how long it has been outstanding, in seconds."""
        return trio.current_time() - self.since

    def describe(self) -> dict[str, Any]:
        """Return what people want to know of it."""
        about = {name: str(value) if name == "pages" else value for name, value in self.message.subject.items()}
        return {"notification": self.kind, **about, "request": self.message.cause, "age": round(self.age, 3)}


class Outstanding(Generic[_Owner]):
    """All notifications that have not been acknowledged; `len` says how many."""

    def __init__(self) -> None:
        self._of: Final[dict[_Owner, list[Pending[_Owner]]]] = {}  # the oldest first
        self._all: Final[dict[Pending[_Owner], None]] = {}  # the oldest first
        self._tallies: Final[dict[str, Tally]] = {}
        self._waiting: Final = trio.lowlevel.ParkingLot()

    def __len__(self) -> int:
        return len(self._all)

    @property
    def is_recent(self) -> bool:
        """Whether all that is outstanding, of any owner, was sent a moment ago, so that nobody waits for long yet."""
        return not self._all or next(iter(self._all)).age < _MOMENT

    def of(self, owner: _Owner, message: Notification) -> Pending[_Owner]:
        """Return a notification that is outstanding within a `with` block, and then is to be counted."""
        return Pending(self, owner, message)

    def add(self, pending: Pending[_Owner]) -> None:
        """Enter a notification. For Pending."""
        self._of.setdefault(pending.owner, []).append(pending)
        self._all[pending] = None
        if self._waiting:
            self._waiting.unpark_all()

    def remove(self, pending: Pending[_Owner]) -> None:
        """Strike a notification out. For Pending."""
        theirs = self._of[pending.owner]
        theirs.remove(pending)
        del self._all[pending]
        if not theirs:
            del self._of[pending.owner]

    def count(self, pending: Pending[_Owner]) -> None:
        """Count a notification that has ended, whether or not it was ever outstanding."""
        kind = pending.tallied
        tally = self._tallies.get(kind)
        if tally is None:
            tally = self._tallies[kind] = Tally()
        tally.add(pending.page_count, pending.age)

    def by(self, owner: _Owner) -> Sequence[Pending[_Owner]]:
        """Return what an owner has not acknowledged, the oldest first."""
        return self._of.get(owner, ())

    @property
    def owners(self) -> frozenset[_Owner]:
        """Owners that are being waited for."""
        return frozenset(self._of)

    async def wait(self) -> None:
        """Wait until an owner is waited for; it may have acknowledged by the time that this returns."""
        if not self._all:
            await self._waiting.park()

    def describe(self) -> dict[str, Any]:
        """Return what became of those that have ended, by kind."""
        return {kind: tally.describe() for kind, tally in sorted(self._tallies.items())}

    def check(self) -> None:
        """Raise AssertionError on the first broken invariant."""
        assert all(self._of.values()), "an owner is waited for that owes nothing"
        owed = sum(map(len, self._of.values()))
        for tally in self._tallies.values():
            tally.check()
        assert owed == len(self._all), f"{len(self._all)} notifications are outstanding, {owed} are owed"
