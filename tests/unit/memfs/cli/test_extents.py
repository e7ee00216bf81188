"""A file's extents, found bit by bit, and those of one that has as many holes as pages."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator

import pytest

from memfs.cli.watch.extents import Extents
from memfs.cli.watch.memory import _locked
from memfs.contract.sys.libc import PUNCH_HOLE, fallocate
from memfs.contract.units import PAGE_SIZE
from tests.helpers import pages, raises


@pytest.fixture
def fd() -> Iterator[int]:
    fd = os.memfd_create("sparse")
    os.ftruncate(fd, 1000 * PAGE_SIZE)
    yield fd
    os.close(fd)


def fill(fd: int, *numbers: int) -> None:
    for number in numbers:
        os.pwrite(fd, b"x", number * PAGE_SIZE)


def test_extents_are_found_whatever_the_number_of_calls(fd: int) -> None:
    fill(fd, 0, 1, 2, 10, 500, 501, 999)
    for most_calls in (2, 3, 8, 100):
        extents = Extents()
        while not extents.look(fd, pages(0, 1000), 1, most_calls):
            pass
        assert extents.runs.tolist() == [[0, 3], [10, 11], [500, 502], [999, 1000]]


def test_what_has_changed_is_seen_and_what_lies_outside_is_not(fd: int) -> None:
    fill(fd, 0, 10, 20)
    extents = Extents()
    assert extents.look(fd, pages(5, 1000), 1, 100)
    assert extents.runs.tolist() == [[10, 11], [20, 21]]
    os.ftruncate(fd, 15 * PAGE_SIZE)
    fill(fd, 11)
    assert extents.look(fd, pages(5, 1000), 1, 100)
    assert extents.runs.tolist() == [[10, 12]]
    assert extents.look(fd, pages(0, 15), 1, 100)
    assert extents.runs.tolist() == [[0, 1], [10, 12]]


@pytest.mark.parametrize("answers", [(0, 4096), (5 * 4096, 5 * 4096), (8 * 4096, 6 * 4096), (-1, 1 << 62)])
def test_answers_of_a_filesystem_that_make_no_sense_end_it(
    fd: int, monkeypatch: pytest.MonkeyPatch, answers: tuple[int, int]
) -> None:
    monkeypatch.setattr("memfs.cli.watch.extents.os.lseek", lambda fd, at, whence: answers[whence == os.SEEK_HOLE])
    with raises(errno.EIO):
        Extents().look(fd, pages(5, 1000), 1, 100)


def test_what_is_freed_between_two_calls_is_no_error(fd: int, monkeypatch: pytest.MonkeyPatch) -> None:
    fill(fd, 3, 4, 10)
    lseek = os.lseek

    def freed(fd: int, at: int, whence: int) -> int:
        if whence == os.SEEK_HOLE and at == 3 * PAGE_SIZE:
            fallocate(fd, PUNCH_HOLE, at, PAGE_SIZE)
        return lseek(fd, at, whence)

    monkeypatch.setattr("memfs.cli.watch.extents.os.lseek", freed)
    extents = Extents()
    assert extents.look(fd, pages(0, 1000), 1, 100)
    assert extents.runs.tolist() == [[4, 5], [10, 11]]


def test_locks_that_make_no_sense_are_none() -> None:
    for said in (
        "",
        "{}",
        '{"runs": [[1]]}',
        '{"runs": [[3, 2]]}',
        '{"runs": [["a", {}]]}',
        "[" * 9999,
        '{"runs": [[1e999, 2]]}',
    ):
        assert not len(_locked(said))
    assert _locked('{"runs": [[1, 3], [3, 4]]}').tolist() == [[1, 4]]


def test_look_makes_few_calls_and_passes_over_what_is_mixed_anyway(fd: int, monkeypatch: pytest.MonkeyPatch) -> None:
    fill(fd, *range(0, 1000, 2))
    calls, lseek = 0, os.lseek

    def counted(*arguments: int) -> int:
        nonlocal calls
        calls += 1
        return lseek(*arguments)

    monkeypatch.setattr("memfs.cli.watch.extents.os.lseek", counted)
    extents, looks = Extents(), 1
    while not extents.look(fd, pages(0, 1000), 100, 32):
        assert calls <= 32 * looks
        looks += 1
    assert calls <= 10 * 2 * 20  # of ten cells with fifty extents each
    for cell in range(0, 1000, 100):
        assert any(cell <= start < cell + 100 for start, _ in extents.runs.tolist())
