"""A file that another process has left: it has the pages that its map shows, for no more work than it takes."""

from __future__ import annotations

import random
from collections.abc import Iterator

import pytest

from memfs.contract.page_ranges import PageRanges
from memfs.contract.sys.libc import FALLOC_FL_KEEP_SIZE, PUNCH_HOLE, cachestat, fallocate
from memfs.contract.units import PAGE_SIZE, PageIndex
from memfs.state.journal import INTENT, Committed, LogJournal, numbered
from memfs.store import conversion
from memfs.store import pages as pages_module
from memfs.store.file import File
from memfs.store.seals import F_SEAL_GUEST
from memfs.store.tmpfs_backing import TmpfsBacking
from tests.helpers import at, new_backing, not_none, pages

SIZE = 512  # pages of the file
LIMIT = 1024


@pytest.fixture
def backing() -> Iterator[TmpfsBacking]:
    backing = new_backing(TmpfsBacking, LIMIT * PAGE_SIZE)
    assert isinstance(backing, TmpfsBacking)
    if backing.state is None:
        pytest.skip("a mount that is nowhere cannot be cloned before Linux 6.15")
    yield backing
    backing.close()


async def left(backing: TmpfsBacking, shown: set[int], there: set[int]) -> None:
    """Leave file 1, guest-sealed, whose map shows some pages and which has others."""
    file = File(backing, 1, F_SEAL_GUEST)
    with file.held():
        await file.truncate(at(SIZE))
        for page in shown:
            await file.allocate(at(page), PAGE_SIZE, keep_size=False)
        for page in there - shown:
            fallocate(file.fd, FALLOC_FL_KEEP_SIZE, at(page), PAGE_SIZE)
        for page in shown - there:
            fallocate(file.fd, PUNCH_HOLE, at(page), PAGE_SIZE)


def recovered(backing: TmpfsBacking) -> File:
    file = File(backing, 1, F_SEAL_GUEST, exists=True)
    file.recover(is_given_out=False, image=b"")
    backing.recovered(LIMIT, file.tracked_pages)
    return file


def what_is_there(file: File) -> set[int]:
    with file.held():
        return {page for page in range(SIZE) if cachestat(file.fd, [(at(page), PAGE_SIZE)]) == [1]}


def what_is_shown(file: File) -> set[int]:
    with file.held():
        page_map = not_none(file.page_map)
        return {page for page in range(SIZE) if page_map.is_allocated(PageIndex(page))}


@pytest.mark.parametrize("count", [1, 7, 100])
@pytest.mark.parametrize("stray", [False, True], ids=["some are gone", "some too many"])
async def test_it_has_the_pages_that_its_map_shows(backing: TmpfsBacking, count: int, stray: bool) -> None:
    chance = random.Random(count)
    shown = set(chance.sample(range(SIZE), 200))
    different = chance.sample(sorted(set(range(SIZE)) - shown if stray else shown), count)
    await left(backing, shown, shown ^ set(different))
    file = recovered(backing)
    assert what_is_shown(file) == shown
    assert what_is_there(file) == shown
    file.check()
    file.close()


@pytest.mark.parametrize("stray", [False, True], ids=["one is gone", "one too many"])
async def test_only_what_differs_is_done(backing: TmpfsBacking, monkeypatch: pytest.MonkeyPatch, stray: bool) -> None:
    shown = set(range(0, SIZE, 2))
    await left(backing, shown, shown ^ {101 if stray else 100})
    calls = []

    def counted(fd: int, mode: int, offset: int, length: int) -> None:
        calls.append((offset, length))
        fallocate(fd, mode, offset, length)

    monkeypatch.setattr(pages_module, "fallocate", counted)
    file = recovered(backing)
    assert calls == [(at(101 if stray else 100), PAGE_SIZE)]
    assert what_is_there(file) == shown
    file.close()


@pytest.mark.parametrize("known", [set[int](), {1}], ids=["freed", "about to be sealed"])
async def test_the_map_of_a_file_that_is_none_goes(backing: TmpfsBacking, known: set[int]) -> None:
    await left(backing, {1, 2}, {1, 2})
    backing.remove_others({1}, {1}, end=2)()
    assert backing.page_maps.exists("1"), "it is known"
    remove_rest = backing.remove_others(known, set(), end=2)
    assert backing.page_maps.exists("1") == (not known), "that of a file that may get one again goes at once"
    remove_rest()
    assert not backing.page_maps.exists("1")


async def test_pages_that_were_being_freed_are_gone_if_there_is_no_space(
    backing: TmpfsBacking, caplog: pytest.LogCaptureFixture
) -> None:
    shown, there = set(range(300)), set(range(150)) | {299}
    await left(backing, shown, there)
    content, fd = backing.create(2, guest=True)
    fallocate(fd, 0, 0, (LIMIT - len(there) - 50) * PAGE_SIZE)  # of an owner's, who need not ask
    file = recovered(backing)
    assert there <= what_is_there(file) == what_is_shown(file) < shown
    assert "No space left" in caplog.text
    file.check()
    file.close()
    backing.shut(fd)
    backing.free(content)


async def test_a_conversion_that_cannot_be_settled_concerns_nobody_else(
    backing: TmpfsBacking, caplog: pytest.LogCaptureFixture
) -> None:
    await left(backing, {1, 2}, {1, 2})
    guest = recovered(backing)
    lost, shared = File(backing, 3), File(backing, 4)
    backing.free(backing.find(3, guest=False))  # so that there is nothing to open
    with shared.held():
        await shared.allocate(at(0), at(SIZE), keep_size=False)
    assert backing.state is not None
    journal = LogJournal(backing.state.root)
    intent = conversion._INTENT.pack(1, True) + PageRanges.of([pages(1, 3)]).array.tobytes()
    files = {1: guest, 3: lost, 4: shared}
    intents = [numbered(INTENT, number) for number in (3, 4)]
    conversion.settle(Committed(intents, lambda keys: [intent for _ in keys]), files.get, journal)
    assert shared.pages == SIZE - 2
    assert "files 3 and 1" in caplog.text
    journal.close()
    shared.close()
    guest.close()
