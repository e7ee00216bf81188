"""The log: what was committed is there, whatever else had been written when its writer died."""

from __future__ import annotations

import itertools
import os
import random
import re
import resource
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from memfs.state import log as log_module
from memfs.state.journal import LogJournal
from memfs.state.log import Log, UnreadableState


@pytest.fixture
def root(tmp_path: Path) -> Iterator[int]:
    fd = os.open(tmp_path, os.O_PATH)
    yield fd
    os.close(fd)


_keys = st.sampled_from([b"a", b"b", b"long" * 20, b"c\0d"])
_changes = st.dictionaries(_keys, st.none() | st.binary(max_size=30), min_size=1)


@given(st.lists(_changes, max_size=12), _changes)
def test_every_prefix_of_a_log_is_what_was_committed_by_then(
    tmp_path_factory: pytest.TempPathFactory, transactions: list[dict[bytes, bytes | None]], last: dict[bytes, bytes]
) -> None:
    root = os.open(tmp_path_factory.mktemp("log"), os.O_PATH)
    values: dict[bytes, bytes] = {}
    log = Log(root)
    for changes in transactions:
        for key, value in changes.items():
            log.put(key, value)
            if value is None:
                values.pop(key, None)
            else:
                values[key] = value
        log.commit()
        reader = Log(root)
        assert reader.load() == values
        reader.close()
    for key, value in last.items():
        log.put(key, value)  # and dies before it commits
    log.close()
    reader = Log(root)
    assert reader.load() == values
    reader.close()
    os.close(root)


def test_it_stays_short_whatever_is_committed_and_at_each_moment_of_that(
    root: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(log_module, "_SHORT", 2000)
    values: dict[bytes, bytes] = {}
    log = Log(root)
    numbers, names = random.Random(1), set[str]()
    for step in range(3000):
        key = b"%d" % numbers.randrange(50)
        if numbers.random() < 0.2:
            values.pop(key, None)
        else:
            values[key] = b"%d" % step
        log.put(key, values.get(key))
        log.commit()
        assert log.nbytes < 20_000
        names.update(os.listdir(tmp_path))
        if step % 50 == 0:  # it is killed here
            log.close()
            log = Log(root)
            assert log.load() == values
    assert len(names) > 10, "it has not been compacted often"
    assert len(os.listdir(tmp_path)) <= 2
    log.close()


_sizes = st.sampled_from([0, 10, 30, 500, 3000, 20_000, 60_000])
_large_changes = st.dictionaries(st.integers(0, 30).map(b"%d".__mod__), st.none() | _sizes, min_size=1, max_size=4)


@settings(max_examples=60, deadline=None)
@given(st.lists(_large_changes, min_size=20, max_size=150))
def test_how_long_it_is_depends_on_what_is_true_and_a_commit_on_what_was_appended(
    tmp_path_factory: pytest.TempPathFactory, transactions: list[dict[bytes, int | None]]
) -> None:
    """Whatever the sizes are."""
    root = os.open(tmp_path_factory.mktemp("log"), os.O_PATH)
    values: dict[bytes, bytes] = {}
    log, most_true = Log(root), 0
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(log_module, "_SHORT", 2000)
        for number, changes in enumerate(transactions):
            before, appended = log.nbytes, 0
            for key, size in changes.items():
                value = None if size is None else number.to_bytes(2) + bytes(size)
                log.put(key, value)
                appended += 6 + len(key) + len(value or b"")
                if value is None:
                    values.pop(key, None)
                else:
                    values[key] = value
            log.commit()
            longest = 70_000
            assert log.nbytes - before <= 2 * appended + max(2 * appended, 2048) + longest
            assert log.true_bytes == sum(6 + len(key) + len(value) for key, value in values.items())
            most_true = max(most_true, log.true_bytes)
            assert log.nbytes <= 7 * most_true + 3 * 2000 + 4 * appended
    assert log.load() == values
    log.close()
    os.close(root)


def test_what_has_changed_without_being_noted_stays_as_it_was_committed(
    root: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Compaction asks nobody what is true, so a mistake elsewhere costs a change, and not the whole key."""
    monkeypatch.setattr(log_module, "_SHORT", 2000)
    journal, values = LogJournal(root), {b"x": b"committed", b"y": b""}
    journal.keeps(b"x", values.get)
    journal.keeps(b"y", values.get)
    journal.changed(b"x")
    journal.commit()
    values[b"x"] = b"forgotten"
    compacted = 0
    for number in range(2000):
        values[b"y"] = b"%d" % number
        journal.changed(b"y")
        journal.commit()
        compacted = max(int(name[4:]) for name in os.listdir(f"/proc/self/fd/{root}"))
    assert compacted > 3
    assert journal.load()[b"x"] == b"committed"
    journal.close()


def test_a_commit_does_not_fail_when_no_log_can_be_created(
    root: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is compacted later."""
    monkeypatch.setattr(log_module, "_SHORT", 2000)
    log = Log(root)
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (0, hard))
    try:
        for number in range(1000):
            log.put(b"a", b"%d" % number)
            log.commit()
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert log.nbytes > 9000
    for number in range(1000):
        log.put(b"a", b"%d" % number)
        log.commit()
    assert log.nbytes < 9000
    assert log.load() == {b"a": b"999"}
    assert len(os.listdir(tmp_path)) <= 2
    log.close()


def test_what_was_compacted_is_freed_in_pieces(root: int) -> None:
    """All of it at once would take milliseconds."""
    log, resident = Log(root), [0]
    for _ in range(300):
        log.put(b"a", bytes(60_000))
        log.commit()
        resident.append(_resident_of_removed_logs())
    freed = [before - now for before, now in itertools.pairwise(resident) if now < before]
    assert len(freed) > 4
    assert max(freed) <= 1024  # KiB
    log.close()


def _resident_of_removed_logs() -> int:
    """Return how much memory of mapped logs that have no name any more is resident, in KiB."""
    with open("/proc/self/smaps") as maps:
        mappings = re.split(r"^(?=[0-9a-f]+-)", maps.read(), flags=re.MULTILINE)
    removed = [each for each in mappings if re.search(r"/log-\d+ \(deleted\)$", each, re.MULTILINE)]
    return sum(int(kib) for each in removed for kib in re.findall(r"^Rss: +(\d+) kB", each, re.MULTILINE))


def test_it_can_be_closed_while_it_is_compacted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also when its directory has been closed before."""
    monkeypatch.setattr(log_module, "_SHORT", 2000)
    root = os.open(tmp_path, os.O_PATH)
    log, number = Log(root), 0
    while len(os.listdir(tmp_path)) < 2:
        number += 1
        log.put(b"%d" % (number % 50), b"1")
        log.commit()
    os.close(root)
    log.close()
    root = os.open(tmp_path, os.O_PATH)
    log = Log(root)
    assert len(log.load()) == 50
    assert len(os.listdir(tmp_path)) == 1
    log.close()
    os.close(root)


def test_one_that_is_not_complete_is_removed(root: int, tmp_path: Path) -> None:
    log = Log(root)
    log.put(b"a", b"1")
    log.commit()
    log.close()
    (tmp_path / "log-2").write_bytes(b"")
    os.truncate(tmp_path / "log-2", 1 << 36)
    log = Log(root)
    assert log.load() == {b"a": b"1"}
    assert os.listdir(tmp_path) == ["log-1"]
    log.close()


def test_another_version_is_refused_and_nothing_is_changed(root: int, tmp_path: Path) -> None:
    log = Log(root)
    log.close()
    with (tmp_path / "log-1").open("r+b") as file:
        file.seek(8)
        file.write(b"\x07\0\0\0")
    with pytest.raises(UnreadableState, match="version 7"):
        Log(root)
    assert os.listdir(tmp_path) == ["log-1"]
