"""The log: what was committed is there, whatever else had been written when its writer died."""

from __future__ import annotations

import os
import random
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from memfs.state import log as log_module
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
    log = Log(root, values.get)
    for changes in transactions:
        for key, value in changes.items():
            log.put(key, value)
            if value is None:
                values.pop(key, None)
            else:
                values[key] = value
        log.commit()
        reader = Log(root, values.get)
        assert reader.load() == values
        reader.close()
    for key, value in last.items():
        log.put(key, value)  # and dies before it commits
    log.close()
    reader = Log(root, values.get)
    assert reader.load() == values
    reader.close()
    os.close(root)


def test_it_stays_short_whatever_is_committed_and_at_each_moment_of_that(
    root: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(log_module, "_SHORT", 2000)
    values: dict[bytes, bytes] = {}
    log = Log(root, values.get)
    numbers, names = random.Random(1), set[str]()
    for step in range(3000):
        key = b"%d" % numbers.randrange(50)
        if numbers.random() < 0.2:
            values.pop(key, None)
        else:
            values[key] = b"%d" % step
        log.put(key, values.get(key))
        log.commit()
        assert log.nbytes < 10_000
        names.update(os.listdir(tmp_path))
        if step % 50 == 0:  # it is killed here
            log.close()
            log = Log(root, values.get)
            assert log.load() == values
    assert len(names) > 10, "it has not been compacted often"
    assert len(os.listdir(tmp_path)) <= 2
    log.close()


def test_it_can_be_closed_while_it_is_compacted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also when its directory has been closed before."""
    monkeypatch.setattr(log_module, "_SHORT", 2000)
    root = os.open(tmp_path, os.O_PATH)
    log, number = Log(root, lambda key: b"1"), 0
    while len(os.listdir(tmp_path)) < 2:
        number += 1
        log.put(b"%d" % number, b"1")
        log.commit()
    os.close(root)
    log.close()
    root = os.open(tmp_path, os.O_PATH)
    log = Log(root, lambda key: b"1")
    assert len(log.load()) == number
    assert len(os.listdir(tmp_path)) == 1
    log.close()
    os.close(root)


def test_one_that_is_not_complete_is_removed(root: int, tmp_path: Path) -> None:
    log = Log(root, {b"a": b"1"}.get)
    log.put(b"a", b"1")
    log.commit()
    log.close()
    (tmp_path / "log-2").write_bytes(b"")
    os.truncate(tmp_path / "log-2", 1 << 36)
    log = Log(root, {b"a": b"1"}.get)
    assert log.load() == {b"a": b"1"}
    assert os.listdir(tmp_path) == ["log-1"]
    log.close()


def test_another_version_is_refused_and_nothing_is_changed(root: int, tmp_path: Path) -> None:
    log = Log(root, lambda key: None)
    log.close()
    with (tmp_path / "log-1").open("r+b") as file:
        file.seek(8)
        file.write(b"\x07\0\0\0")
    with pytest.raises(UnreadableState, match="version 7"):
        Log(root, lambda key: None)
    assert os.listdir(tmp_path) == ["log-1"]
