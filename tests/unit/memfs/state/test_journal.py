"""The journal: a transaction is one request, and what it frees is freed after it."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from memfs.state.journal import LogJournal, NoJournal, last_answer, number_in, numbered, rest_of


@pytest.fixture
def root(tmp_path: Path) -> Iterator[int]:
    fd = os.open(tmp_path, os.O_PATH)
    yield fd
    os.close(fd)


def test_what_has_changed_is_written_with_the_reply_and_then_freed(root: int) -> None:
    journal, values, order = LogJournal(root), {b"x1": b"one"}, []
    journal.keeps(b"x", values.get)
    journal.changed(b"x1")
    journal.changed(b"x2")
    journal.defer(lambda: order.append(LogJournal(root).load().get(b"x1")))
    assert not order
    journal.commit(41, b"reply")
    assert order == [b"one"]
    state = LogJournal(root).load()
    assert (state[b"x1"], b"x2" in state, last_answer(state)) == (b"one", False, (41, b"reply"))
    journal.changed(b"x1")
    journal.commit()
    assert last_answer(LogJournal(root).load()) == (41, b"reply")
    journal.check({b"x1"})
    with pytest.raises(AssertionError, match="not in the log"):
        journal.check({b"x3"})
    values[b"x1"] = b"two"
    with pytest.raises(AssertionError, match="the log says"):
        journal.check(set())
    journal.close()


def test_what_is_freed_may_change_more(root: int) -> None:
    journal, values = LogJournal(root), {b"x1": b"one"}
    journal.keeps(b"x", values.get)
    journal.defer(lambda: journal.changed(b"x1"))
    journal.commit()
    assert LogJournal(root).load() == {b"x1": b"one"}
    assert not journal.dirty


def test_a_long_reply_is_not_kept(root: int) -> None:
    journal = LogJournal(root)
    journal.keeps(b"x", lambda key: b"")
    journal.changed(b"x")
    journal.commit(41, bytes(100_000))
    assert last_answer(LogJournal(root).load()) == (0, b"")


def test_without_a_journal_things_are_freed_immediately() -> None:
    freed = list[int]()
    journal = NoJournal()
    journal.changed(b"x")
    journal.defer(lambda: freed.append(1))
    assert (freed, journal.dirty) == ([1], {})
    journal.commit(1, b"")


def test_keys(root: int) -> None:
    key = numbered(b"e", 1 << 40) + b"a name"
    assert (key[:1], number_in(key), rest_of(key)) == (b"e", 1 << 40, b"a name")
    assert numbered(b"e", 1 << 40, b"a name") == key
    journal = LogJournal(root)
    journal.changed(b"e", 1 << 40, b"a name")
    journal.changed(b"e", 0)
    journal.changed(b"e")
    assert list(journal.dirty) == [key, numbered(b"e", 0), b"e"]
    journal.close()
