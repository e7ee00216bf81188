"""The last answers to those of an owner's requests that must not be done twice.

These are Register, Unregister, GetPfn with a lock, PutPfn and Populate.
An owner whose memfs was killed repeats what was not answered, as far as it knows. If it had been done, then the answer
was written down in the same transaction, and is what it gets; a repeated request of which there is no answer was not
done. Which requests were refused is not remembered: they changed nothing, and may succeed now.

Answers arrive in the order in which they are sent, and an owner has MAX_IN_FLIGHT requests at most that are unanswered
to its knowledge, so an answer that has not arrived is among the last MAX_IN_FLIGHT ones. Of GetPfn that gets a lock an
answer is cut shorter (registration.py), so an owner's take 100 KiB at the most.
"""

from __future__ import annotations

import struct
from typing import Final

from memfs.contract.protocol.connection import MAX_IN_FLIGHT, RequestId
from memfs.contract.protocol.messages import MESSAGES, GetPfn, Message, Populate, PutPfn, Register, Unregister
from memfs.owners.records import ANSWER
from memfs.state.journal import Journal, numbered

_HEADER: Final = struct.Struct("=QQH")  # the how manieth answer, to which request, its type; then its body
_SLOT: Final = struct.Struct(">H")  # of a key


def must_not_be_repeated(message: Message) -> bool:
    """Return whether a request has another effect when it is done twice."""
    return isinstance(message, Register | Unregister | PutPfn | Populate) or (
        isinstance(message, GetPfn) and message.lock
    )


class Answers:
    """One owner's, who has a number."""

    __slots__ = ("_count", "_journal", "_number", "_slots")

    def __init__(self, journal: Journal, number: int) -> None:
        self._journal: Final = journal
        self._number: Final = number
        self._slots: Final[dict[bytes, bytes]] = {}  # by the rest of the key
        self._count = 0  # so many were added

    def add(self, request: RequestId, answer: Message) -> None:
        """Remember an answer, in place of the oldest one."""
        slot = _SLOT.pack(self._count % MAX_IN_FLIGHT)
        self._slots[slot] = _HEADER.pack(self._count, request, answer.TYPE) + answer.pack()
        self._count += 1
        self._journal.changed(ANSWER, self._number, slot)

    def of(self, request: RequestId) -> Message | None:
        """Return what a request was answered, if it was done and that is remembered."""
        for value in self._slots.values():
            _, number, kind = _HEADER.unpack_from(value)
            if number == request:
                return MESSAGES[kind].unpack(memoryview(value)[_HEADER.size :])
        return None

    def value(self, slot: bytes) -> bytes | None:
        """Return what is written of an answer, by the rest of its key."""
        return self._slots.get(slot)

    def restore(self, slot: bytes, value: bytes) -> None:
        """Remember what was written of an answer, by the rest of its key."""
        self._slots[slot] = value
        self._count = max(self._count, _HEADER.unpack_from(value)[0] + 1)

    @property
    def all_keys(self) -> list[bytes]:
        """The keys of all that is remembered."""
        return [numbered(ANSWER, self._number, slot) for slot in self._slots]
