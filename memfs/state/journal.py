"""The journal: what a request has changed is committed with its reply, right before that is sent.

State is **keys** and what their values are; whoever keeps something says how to get its value (`keeps`), and says so
when it has changed (`changed`). With the commit the values of all keys that have changed are written: after-images, so
that a newer version of memfs may do things otherwise. One transaction is one request: what it changed, its number and
its reply.

    change ... change -> commit (state, number, reply) -> what was deferred -> the reply is sent

Nothing is awaited between the last change and the reply, so a process that is killed has committed all of a request or
nothing of it, and at most one request is committed and not answered. If the kernel sends that one again, its successor
answers with what is written; all others are done again.

What makes something outside of this process (a file of the backing) comes before the commit, and what frees something
that a key may name comes after it (`defer`). A kill in between leaves at worst something that no key names, and the
successor removes it.

A request that waits may see half of what it did committed with another one's. It is done again then; so what cannot be
done twice changes things only after it has waited.
"""

from __future__ import annotations

import errno
import struct
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from itertools import chain, islice
from typing import Final, Protocol

from memfs.state.log import Log

REPLY: Final = b"r"
INODE: Final = b"i"  #: the kind of keys of inodes (tree/records.py), and of the files that are theirs
INTENT: Final = b"n"  #: the kind of keys of what is being done in steps: their values are noted, and asked of nobody
_REPLY: Final = struct.Struct("=Q")
_DROPPED: Final = 64  # keys with each commit
_LONGEST_REPLY: Final = 512  # bytes; what has a longer one has read something, and can be done again

_NUMBER: Final = struct.Struct(">cQ")

#: Returns the value that a key has now; None if there is none
ValueOf = Callable[[bytes], bytes | None]


def numbered(kind: bytes, number: int, rest: bytes = b"") -> bytes:
    """Return the key of something that has a number, or of the `rest` of what has that number."""
    return _NUMBER.pack(kind, number) + rest


def number_in(key: bytes) -> int:
    """Return the number in a key."""
    number: int = _NUMBER.unpack_from(key)[1]
    return number


def rest_of(key: bytes) -> bytes:
    """Return what follows the number in a key."""
    return key[_NUMBER.size :]


class Committed(Mapping[bytes, bytes]):
    """What was committed, by kinds of keys. Values are read when they are asked for, so ask before the next commit."""

    def __init__(self, keys: Iterable[bytes], values_of: Callable[[Iterable[bytes]], Iterable[bytes]]) -> None:
        self._by_kind: Final[dict[int, list[bytes]]] = {}
        self._values_of: Final = values_of
        for key in keys:
            try:
                self._by_kind[key[0]].append(key)
            except KeyError:
                self._by_kind[key[0]] = [key]

    def of(self, kind: bytes) -> list[bytes]:
        """Return the keys of a kind."""
        return self._by_kind.get(kind[0], [])

    def items_of(self, kind: bytes) -> Iterator[tuple[bytes, bytes]]:
        """Generate the keys of a kind, with their values."""
        keys = self.of(kind)
        return zip(keys, self._values_of(keys), strict=True)

    def __getitem__(self, key: bytes) -> bytes:
        [value] = self._values_of([key])
        return value

    def __iter__(self) -> Iterator[bytes]:
        return chain.from_iterable(self._by_kind.values())

    def __len__(self) -> int:
        return sum(map(len, self._by_kind.values()))


class Journal(Protocol):
    """Where changes are noted."""

    dirty: dict[bytes, None]  #: keys that have changed since the last commit
    is_kept: bool  #: whether anything that is noted is ever read

    def keeps(self, kind: bytes, value_of: ValueOf) -> None:
        """Have the values of all keys that begin with this byte be asked for there."""

    def changed(self, kind: bytes, number: int | None = None, rest: bytes = b"") -> None:
        """Note that the value of a key has changed, or that there is none any more.

        The key is the kind itself, or `numbered`. It is put together here, for most mounts have no journal.
        """

    def drop(self, keys: Iterator[bytes]) -> None:
        """Note keys that have no value any more, and that readers ignore.

        There may be many, so a few go with each commit.
        """

    def check_space(self) -> None:
        """Raise OSError(ENOSPC) unless there may be new keys."""

    def note(self, key: bytes, value: bytes | None) -> None:
        """Give the key of an intent a value, with the next commit; None: it is done."""

    def defer(self, action: Callable[[], None]) -> None:
        """Do something after the commit: it frees what a key has named until now."""

    def commit(self, unique: int = 0, reply: bytes = b"") -> None:
        """Commit what has changed, by a request with a number and what it is about to be answered."""


class NoJournal:
    """The journal of a memfs that does not outlive its process."""

    is_kept = False

    def __init__(self) -> None:
        self.dirty: dict[bytes, None] = {}

    def keeps(self, kind: bytes, value_of: ValueOf) -> None:
        """Do nothing."""

    def changed(self, kind: bytes, number: int | None = None, rest: bytes = b"") -> None:
        """Do nothing."""

    def drop(self, keys: Iterator[bytes]) -> None:
        """Do nothing."""

    def check_space(self) -> None:
        """Do nothing."""

    def note(self, key: bytes, value: bytes | None) -> None:
        """Do nothing."""

    def defer(self, action: Callable[[], None]) -> None:
        """Do it now."""
        action()

    def commit(self, unique: int = 0, reply: bytes = b"") -> None:
        """Do nothing."""


NO_JOURNAL: Final = NoJournal()


class LogJournal:
    """A journal in a log, in the directory of which `root` is a descriptor. Raises UnreadableState."""

    is_kept = True

    def __init__(self, root: int) -> None:
        self.dirty: dict[bytes, None] = {}
        self._kept: Final[dict[int, ValueOf]] = {}
        self._deferred: list[Callable[[], None]] = []
        self._last = b""
        self._intents: Final[dict[bytes, bytes]] = {}
        self._log: Final = Log(root)
        self._dropped: Final[deque[Iterator[bytes]]] = deque()
        self.keeps(REPLY, lambda key: self._last)
        self.keeps(INTENT, self._intents.get)

    def value_of(self, key: bytes) -> bytes | None:
        """Return the value that a key has now."""
        value_of = self._kept.get(key[0])
        return value_of(key) if value_of is not None else None

    def keeps(self, kind: bytes, value_of: ValueOf) -> None:
        """Have the values of all keys that begin with this byte be asked for there."""
        assert kind[0] not in self._kept, f"two keep what begins with {kind!r}"
        self._kept[kind[0]] = value_of

    def load(self) -> Committed:
        """Return what was committed."""
        self._last = self._log.get(REPLY) or b""
        return Committed(self._log.keys(), self._log.values)

    def committed(self, key: bytes) -> bytes:
        """Return the value of a key that was committed. Raises KeyError."""
        value = self._log.get(key)
        if value is None:
            raise KeyError(key)
        return value

    def changed(self, kind: bytes, number: int | None = None, rest: bytes = b"") -> None:
        """Note that the value of a key has changed."""
        self.dirty[kind if number is None else numbered(kind, number, rest)] = None

    def drop(self, keys: Iterator[bytes]) -> None:
        """Note keys that have no value any more, of which a few go with each commit."""
        self._dropped.append(keys)

    def check_space(self) -> None:
        """Raise OSError(ENOSPC) unless there may be new keys."""
        if self._log.is_full:
            raise OSError(errno.ENOSPC, "no space for what outlives the process; remove something")

    def note(self, key: bytes, value: bytes | None) -> None:
        """Give the key of an intent a value; None: it is done."""
        if value is None:
            self._intents.pop(key, None)
        else:
            self._intents[key] = value
        self.dirty[key] = None

    def defer(self, action: Callable[[], None]) -> None:
        """Do something after the commit."""
        self._deferred.append(action)

    def commit(self, unique: int = 0, reply: bytes = b"") -> None:
        """Commit what has changed, and then do what was deferred, which may change more."""
        put, kept = self._log.put, self._kept
        while self.dirty or self._deferred:
            if unique and len(reply) <= _LONGEST_REPLY:
                self._last = _REPLY.pack(unique) + reply
                put(REPLY, self._last)
            for key in self.dirty:
                put(key, kept[key[0]](key))
            self.dirty.clear()
            self._put_dropped(_DROPPED)
            self._log.commit()
            deferred, self._deferred = self._deferred, []
            for action in deferred:
                action()

    def _put_dropped(self, most: int) -> None:
        while self._dropped:
            for key in islice(self._dropped[0], most):
                self._log.put(key, None)
                most -= 1
            if not most:
                break
            self._dropped.popleft()

    def check(self, keys: set[bytes]) -> None:
        """Raise AssertionError unless the log says what there is: at least these keys.

        Costs time proportional to that.
        """
        assert not self.dirty, f"not committed: {list(self.dirty)}"
        while self._dropped:
            self._put_dropped(_DROPPED)
        self._log.commit()
        state = self._log.load()
        assert keys <= state.keys(), f"not in the log: {keys - state.keys()}"
        for key, value in state.items():
            now = self.value_of(key)
            assert now == value, f"{key!r} is {now!r}, and the log says {value!r}"

    def own(self) -> None:
        """Note that from now on what is written is of our version."""
        self._log.own()

    def close(self) -> None:
        """Unmap the log, which stays."""
        self._log.close()


def last_answer(state: Mapping[bytes, bytes]) -> tuple[int, bytes]:
    """Return the number of the request that was committed last, and its reply; 0 if there is none."""
    value = state.get(REPLY, bytes(_REPLY.size))
    return _REPLY.unpack_from(value)[0], value[_REPLY.size :]
