"""Log lines: one an event, whatever is in them, and not more than are wanted of one kind."""

from __future__ import annotations

import logging
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from memfs.contract.logs import Formatter, RateLimit, current_request, fields, set_up, working_on


def record(message: str, line: int = 1, **values: object) -> logging.LogRecord:
    made = logging.LogRecord("memfs.test", logging.WARNING, "file.py", line, message, (), None)
    made.__dict__.update(fields(**values))
    return made


def test_fields_follow_the_message() -> None:
    line = Formatter().format(record("notify", owner=3, pages="[0, 4)", seconds=0.25))
    assert line.partition(" level=")[2] == (
        'warning logger=memfs.test msg=notify owner=3 pages="[0, 4)" seconds=0.250000'
    )


@pytest.mark.parametrize("name", ["a\nlevel=error", "a\rb", 'a" level="error', "a=b", "", "a\x1b[2J", "a\u2028b"])
def test_what_a_client_calls_itself_stays_one_value(name: str) -> None:
    line = Formatter().format(record(f"owner 1 ({name}) is here", name=name))
    assert len(line.splitlines()) == 1
    assert line.isprintable()
    assert line.count(" level=") - line.count('\\" level=') <= 1


def test_traceback_is_one_value() -> None:
    failed = record("failed")
    try:
        raise ValueError("no")
    except ValueError:
        failed.exc_info = sys.exc_info()
    line = Formatter().format(failed)
    assert len(line.splitlines()) == 1
    assert "ValueError: no" in line


def test_request_is_said_while_it_is_worked_on() -> None:
    assert "request=" not in Formatter().format(record("idle"))
    with working_on(412):
        assert " request=412" in Formatter().format(record("notify"))
        with working_on(413):
            assert current_request() == 413
        assert current_request() == 412
    assert current_request() == 0


def test_lines_from_one_place_are_limited_and_those_left_out_are_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 100.0
    monkeypatch.setattr("memfs.contract.logs.time.monotonic", lambda: now)
    limit = RateLimit()
    assert [limit.filter(record("flood")) for _ in range(25)] == [True] * 10 + [False] * 15
    assert limit.filter(record("another", line=2))
    now += 6
    after = record("flood")
    assert limit.filter(after)
    assert "suppressed=15" in Formatter().format(after)
    assert "suppressed" not in Formatter().format(record("flood"))


@contextmanager
def logging_to(log: Path, *, when_needed: bool = False) -> Iterator[logging.Logger]:
    """Log to a file within the block, and nowhere else."""
    root = logging.getLogger()
    others, level = root.handlers[:], root.level
    root.handlers.clear()
    try:
        set_up([str(log)], logging.INFO, when_needed=when_needed)
        yield logging.getLogger("memfs.test")
    finally:
        for handler in root.handlers:
            handler.close()
        root.handlers[:] = others
        root.setLevel(level)


def test_a_log_file_does_not_grow_without_bound(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("memfs.contract.logs.MOST_BYTES", 10_000)
    log = tmp_path / "log"
    with logging_to(log) as logger:
        for number in range(1005):
            logger.info("line", extra=fields(number=number))
    kept = [*(tmp_path / "log.1").read_text().splitlines(), *log.read_text().splitlines()]
    assert sum(path.stat().st_size for path in tmp_path.iterdir()) < 21_000
    assert [int(line.rpartition("=")[2]) for line in kept] == list(range(1005 - len(kept), 1005))
    assert len(kept) > 100


def test_log_that_cannot_be_opened_is_no_reason_to_fail(tmp_path: Path) -> None:
    """The first line comes when no descriptor is left, say; then that one is lost."""
    with logging_to(tmp_path / "directory" / "log", when_needed=True) as log:
        log.warning("lost")
        (tmp_path / "directory").mkdir()
        log.warning("kept")
    assert "msg=kept" in (tmp_path / "directory" / "log").read_text()


def test_what_a_log_is_a_link_to_is_not_renamed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As /dev/stdout is."""
    monkeypatch.setattr("memfs.contract.logs.MOST_BYTES", 10_000)
    log, target = tmp_path / "log", tmp_path / "target"
    log.symlink_to(target)
    with logging_to(log) as logger:
        for number in range(1005):
            logger.info("line", extra=fields(number=number))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["log", "target"]
    assert log.is_symlink()
    assert 0 < target.stat().st_size < 10_100
