"""Conversions of two files: what changes sides, what it costs, what the owner hears; and all is done or nothing."""

from __future__ import annotations

import errno
import functools
import os
import random
from collections.abc import Iterator

import pytest
import trio
from trio.testing import wait_all_tasks_blocked

from memfs.contract.aio.turns import Turns
from memfs.contract.conversion import MAX_RANGES
from memfs.contract.page_map import ALLOCATED
from memfs.contract.page_ranges import NO_PAGES, PageRanges
from memfs.contract.protocol.messages import NO_FILE, FileId
from memfs.contract.sys.constants import F_SEAL_FUTURE_WRITE
from memfs.contract.sys.libc import fallocate
from memfs.contract.units import PAGE_SIZE, PageIndex, PageRange
from memfs.store import seals
from memfs.store.backing import Backing
from memfs.store.conversion import convert
from memfs.store.file import File
from memfs.store.memfd_backing import MemfdBacking
from memfs.store.seals import F_SEAL_GUEST
from memfs.store.tmpfs_backing import TmpfsBacking
from tests.helpers import at, new_backing, not_none, one, pages, raises

SIZE = 16  # pages of each file
LIMIT = 24  # pages in all
SHARED, PRIVATE = FileId(1), FileId(2)
CONTENT = b"content".ljust(PAGE_SIZE, b".")


class Machine:
    """An owner of both files."""

    def __init__(self) -> None:
        self.heard: list[tuple[FileId, FileId, PageRanges, bool]] = []
        self.ends: list[PageRanges] = []
        self.may_go_on = trio.Event()
        self.may_go_on.set()

    async def convert_begin(self, shared: FileId, private: FileId, ranges: PageRanges, *, to_private: bool) -> None:
        assert len(self.heard) == len(self.ends), "one has not ended"
        self.heard.append((shared, private, ranges, to_private))
        with trio.CancelScope(shield=True):
            await self.may_go_on.wait()

    async def convert_end(self, shared: FileId, private: FileId, done: PageRanges, *, to_private: bool) -> None:
        assert (shared, private, to_private) == (*self.heard[-1][:2], self.heard[-1][3])
        assert not done.without(self.heard[-1][2]).pages
        self.ends.append(done)


class Registered:
    """A file of a machine's, which is not told of anything but conversions."""

    def __init__(self, owner: Machine, number: FileId, *, preserves: bool = False) -> None:
        self.owner = owner
        self.id = number
        self.preserves = preserves

    async def invalidate_begin(self, pages: PageRange) -> None: ...

    async def invalidate_end(self, pages: PageRange) -> None: ...

    async def fallocate(self, pages: PageRange) -> None: ...


class Iterations(trio.abc.Instrument):
    """Counts those of the event loop, in each of which others have their turn."""

    def __init__(self) -> None:
        self.count = 0

    def before_io_wait(self, timeout: float) -> None:
        self.count += 1


class Pair:
    """A shared and a private file, and their owner."""

    def __init__(self, backing: Backing) -> None:
        self.backing = backing
        self.shared, self.private = File(backing, 2), File(backing, 1, F_SEAL_GUEST)
        self.machine = Machine()

    def own(self, *, preserves: bool = False) -> None:
        self.shared.bind(Registered(self.machine, SHARED))
        self.private.bind(Registered(self.machine, PRIVATE, preserves=preserves))

    async def convert(self, *ranges: PageRange, to_private: bool, preserve: bool = False) -> None:
        await convert(self.shared, self.private, PageRanges.of(ranges), to_private=to_private, preserve=preserve)

    def write(self, *indexes: int) -> None:
        for index in indexes:
            self.shared.write(at(index), CONTENT)

    def private_pages(self) -> list[int]:
        return [
            index
            for run in not_none(self.private.page_map).runs(pages(0, SIZE), ALLOCATED)
            for index in range(run.start, run.end)
        ]

    @property
    def state(self) -> object:
        """All that a refusal must not change."""
        contents = [os.pread(file.fd, SIZE * PAGE_SIZE, 0) for file in (self.shared, self.private)]
        return (
            *(self.private_pages(), self.shared.pages, self.private.pages, contents),
            *(self.backing.free_pages, len(self.machine.heard)),
        )

    def check(self) -> None:
        for file in (self.shared, self.private):
            file.check()
        assert self.backing.used_pages == self.shared.pages + self.private.pages


@pytest.fixture(params=[TmpfsBacking, MemfdBacking])
def pair(request: pytest.FixtureRequest) -> Iterator[Pair]:
    backing = new_backing(request.param, LIMIT * PAGE_SIZE)
    pair = Pair(backing)
    files = (pair.shared, pair.private)

    async def size() -> None:
        for file in files:
            await file.truncate(at(SIZE))

    trio.run(size)
    with pair.shared.held(), pair.private.held():
        yield pair
        pair.check()
    for file in files:
        file.unbind()
        file.close()
    assert backing.free_pages == LIMIT
    backing.close()


# -- what changes sides --------------------------------------------------------------------------------------------


async def test_there_and_back(pair: Pair) -> None:
    """Pages arrive zeroed; one message begins and one ends it, for both files and all ranges."""
    pair.own()
    pair.write(*range(8))
    ranges = PageRanges.of([one(1), pages(3, 6)])
    await pair.convert(*ranges, to_private=True)
    assert (pair.private_pages(), pair.shared.pages) == ([1, 3, 4, 5], 4)
    assert not os.pread(pair.private.fd, SIZE * PAGE_SIZE, 0).strip(b"\0")
    assert os.pread(pair.shared.fd, 8 * PAGE_SIZE, 0).count(CONTENT) == 4
    os.pwrite(pair.private.fd, CONTENT, at(4))
    await pair.convert(*ranges, to_private=False)
    assert (pair.private_pages(), pair.shared.pages) == ([], 8)
    assert os.pread(pair.shared.fd, 8 * PAGE_SIZE, 0).count(CONTENT) == 4
    assert pair.machine.heard == [(SHARED, PRIVATE, ranges, to_private) for to_private in (True, False)]
    assert pair.machine.ends == [ranges, ranges]


@pytest.mark.parametrize("to_private", [True, False])
async def test_what_is_on_the_wanted_side_costs_nothing(pair: Pair, to_private: bool) -> None:
    """Two vCPUs want the same page: the second is told nothing, takes nothing, and its owner hears nothing."""
    pair.own()
    pair.write(0, 1, 2)
    await pair.private.allocate(at(4), at(4), keep_size=True)
    await pair.convert(one(0), one(5), to_private=to_private)
    before = pair.state
    await pair.convert(one(0), one(5), to_private=to_private)
    assert pair.state == before
    os.pwrite(pair.private.fd, CONTENT, at(7))
    new = one(2) if to_private else one(4)
    await pair.convert(one(0), new, one(7) if to_private else one(9), to_private=to_private)
    assert pair.machine.heard[-1][2] == PageRanges.of([new]), "only of what changes"
    assert os.pread(pair.private.fd, PAGE_SIZE, at(7)) == CONTENT


async def test_ranges_that_are_converted_in_part(pair: Pair) -> None:
    await pair.private.allocate(at(2), at(2), keep_size=True)
    os.pwrite(pair.private.fd, CONTENT, at(2))
    pair.write(0, 1)
    await pair.convert(pages(0, 6), to_private=True)
    assert (pair.private_pages(), pair.shared.pages) == ([0, 1, 2, 3, 4, 5], 0)
    assert os.pread(pair.private.fd, PAGE_SIZE, at(2)) == CONTENT, "it was private already"
    await pair.private.punch(at(3), at(1))
    await pair.convert(pages(0, 16), to_private=False)
    assert (pair.private_pages(), pair.shared.pages) == ([], 5), "what is in neither file stays in neither"


async def test_what_the_shared_file_had_kept_arrives_zeroed(pair: Pair) -> None:
    """Memory that was allocated privately and never punched out of the shared file."""
    pair.write(0, 1, 2)
    await pair.private.allocate(at(0), at(2), keep_size=True)
    await pair.convert(pages(0, 3), to_private=False)
    assert (pair.private_pages(), pair.shared.pages) == ([], 3)
    assert os.pread(pair.shared.fd, 3 * PAGE_SIZE, 0) == bytes(2 * PAGE_SIZE) + CONTENT


async def test_random_conversions(pair: Pair) -> None:
    """Beside a set of page numbers, up to the limit."""
    pair.own()
    lots = random.Random(1)
    private: set[int] = set()
    for _ in range(300):
        chosen = sorted(lots.sample(range(SIZE), lots.randrange(1, SIZE)))
        if lots.random() < 0.3:
            pair.write(*(index for index in chosen[:2] if index not in private))
        to_private = lots.random() < 0.5
        await pair.convert(*map(one, chosen), to_private=to_private)
        private = private | set(chosen) if to_private else private - set(chosen)
        assert pair.private_pages() == sorted(private)
        shared = [index for index in range(SIZE) if os.pread(pair.shared.fd, 1, at(index)) == CONTENT[:1]]
        assert not private & set(shared), "a page is on both sides"
        pair.check()


# -- space ---------------------------------------------------------------------------------------------------------


async def fill(pair: Pair) -> File:
    """Take all that is left."""
    other = File(pair.backing, 3)
    await other.truncate(at(LIMIT))
    await other.allocate(at(0), at(pair.backing.free_pages), keep_size=True)
    assert pair.backing.free_pages == 0
    return other


async def test_limit_counts_what_is_there_after_the_call(pair: Pair) -> None:
    pair.write(*range(SIZE))
    other = await fill(pair)
    await pair.convert(pages(0, SIZE), to_private=True)
    assert (len(pair.private_pages()), pair.shared.pages, pair.backing.free_pages) == (SIZE, 0, 0)
    await pair.convert(*(one(index) for index in range(0, SIZE, 3)), to_private=False)
    assert (len(pair.private_pages()), pair.shared.pages, pair.backing.free_pages) == (10, 6, 0)
    other.close()


async def test_no_space_changes_nothing(pair: Pair) -> None:
    """One page of many is in neither file, and there is no space for it."""
    pair.own()
    pair.write(*range(4))
    other = await fill(pair)
    before = pair.state
    with raises(errno.ENOSPC):
        await pair.convert(pages(0, 5), to_private=True)
    assert pair.state == before
    await other.punch(at(0), at(1))
    await pair.convert(pages(0, 5), to_private=True)
    assert (len(pair.private_pages()), pair.shared.pages, pair.backing.free_pages) == (5, 0, 0)
    other.close()


async def test_nobody_gets_what_a_conversion_needs(pair: Pair) -> None:
    """While its owner is asked, another file wants the last page; and then there is still enough for both sides."""
    pair.own()
    pair.write(*range(4))
    other = await fill(pair)
    pair.machine.may_go_on = trio.Event()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(functools.partial(pair.convert, pages(0, 4), to_private=True))
        await wait_all_tasks_blocked()
        guest = File(pair.backing, 4, F_SEAL_GUEST)
        await guest.truncate(at(4))
        with raises(errno.ENOSPC):
            await guest.allocate(at(0), at(1), keep_size=True)
        pair.machine.may_go_on.set()
    assert pair.backing.free_pages == 0
    other.close()
    guest.close()


# -- all or nothing ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("to_private", [True, False])
@pytest.mark.parametrize("number", [1, 2, 3, 4])
async def test_what_fails_changes_nothing(
    pair: Pair, monkeypatch: pytest.MonkeyPatch, to_private: bool, number: int
) -> None:
    """Until something is freed: of three pages, each allocation fails, and the first free."""
    pair.own()
    if to_private:
        pair.write(0, 2, 4, 6)
    else:
        await pair.private.allocate(at(0), at(7), keep_size=True)
        for index in range(7):
            os.pwrite(pair.private.fd, CONTENT, at(index))
    before = pair.state
    calls = 0

    def fail(fd: int, mode: int, offset: int, length: int) -> None:
        nonlocal calls
        calls += 1
        if calls == number:
            raise OSError(errno.EIO, "told to fail")
        fallocate(fd, mode, offset, length)

    monkeypatch.setattr("memfs.store.pages.fallocate", fail)
    with raises(errno.EIO):
        await pair.convert(one(0), one(2), one(4), to_private=to_private)
    assert pair.machine.ends == [NO_PAGES]
    pair.machine.heard.clear()
    assert pair.state == before
    pair.check()
    monkeypatch.undo()
    pair.machine.ends.clear()
    await pair.convert(one(0), one(2), one(4), to_private=to_private)
    assert set(pair.private_pages()) & {0, 2, 4} == ({0, 2, 4} if to_private else set())


@pytest.mark.parametrize("to_private", [True, False])
@pytest.mark.parametrize("number", [5, 6])
async def test_free_that_fails_leaves_each_page_on_one_side(
    pair: Pair, monkeypatch: pytest.MonkeyPatch, to_private: bool, number: int
) -> None:
    """What was freed before is converted, and the owner hears that; what was not is as it was."""
    pair.own()
    pair.write(0, 2, 4)
    if not to_private:
        await pair.convert(pages(0, 5), to_private=True)
        for index in (0, 2, 4):
            os.pwrite(pair.private.fd, CONTENT, at(index))
    before = set(pair.private_pages())
    calls = 0

    def fail(fd: int, mode: int, offset: int, length: int) -> None:
        nonlocal calls
        calls += 1
        if calls == number:
            raise OSError(errno.EIO, "told to fail")
        fallocate(fd, mode, offset, length)

    monkeypatch.setattr("memfs.store.pages.fallocate", fail)
    with raises(errno.EIO):
        await pair.convert(one(0), one(2), one(4), to_private=to_private)
    monkeypatch.undo()
    done = {0, 2, 4} - set(range(2 * (number - 4), 5))
    assert set(pair.machine.ends[-1].indexes()) == done
    assert set(pair.private_pages()) == (before | done if to_private else before - done)
    shared = {index for index in (0, 2, 4) if os.pread(pair.shared.fd, PAGE_SIZE, at(index)) == CONTENT}
    private = {index for index in (0, 2, 4) if os.pread(pair.private.fd, PAGE_SIZE, at(index)) == CONTENT}
    assert (shared, private) == (({0, 2, 4} - done, set()) if to_private else (set(), {0, 2, 4} - done))
    assert pair.shared.pages == (3 - len(done) if to_private else len(done))
    pair.check()
    await pair.convert(one(0), one(2), one(4), to_private=to_private)
    assert pair.shared.pages == (0 if to_private else 3)


@pytest.mark.parametrize("to_private", [True, False])
async def test_who_asks_again_for_what_is_done_needs_no_permission(pair: Pair, to_private: bool) -> None:
    """The owner that allowed it may be gone, or another one there: nothing is left that it could refuse."""
    pair.own(preserves=True)
    pair.private.initial_image().launch()
    pair.write(0, 1, 5)
    for direction in (True,) if to_private else (True, False):
        await pair.convert(pages(0, 6), to_private=direction, preserve=True)
    pair.private.unbind()
    before = pair.state
    await pair.convert(pages(0, 6), to_private=to_private, preserve=True)
    with raises(errno.EPERM):
        await pair.convert(pages(0, 7), to_private=True, preserve=True)
    pair.private.bind(Registered(Machine(), PRIVATE))
    await pair.convert(pages(0, 6), to_private=to_private)
    assert pair.state == before


@pytest.mark.parametrize("to_private", [True, False])
async def test_signal_between_chunks_leaves_a_part(
    pair: Pair, monkeypatch: pytest.MonkeyPatch, to_private: bool
) -> None:
    """Each page is on one side; the owner hears which are done, and to ask again converts the rest."""
    pair.own()
    await pair.convert(pages(0, SIZE), to_private=not to_private)
    if not to_private:
        assert len(pair.private_pages()) == SIZE
    else:
        pair.write(*range(SIZE))
    monkeypatch.setattr("memfs.store.chunks.CHUNK", 3)
    pair.machine.may_go_on = trio.Event()
    ranges = [pages(0, 5), pages(8, 12)]
    async with trio.open_nursery() as nursery:
        nursery.start_soon(functools.partial(pair.convert, *ranges, to_private=to_private))
        await wait_all_tasks_blocked()
        nursery.cancel_scope.cancel()
        pair.machine.may_go_on.set()
    assert pair.machine.ends[-1] == PageRanges.of([pages(0, 3)])
    assert set(pair.private_pages()) == (set(range(3)) if to_private else set(range(3, SIZE)))
    assert pair.shared.pages == (SIZE - 3 if to_private else 3)
    pair.check()
    await pair.convert(*ranges, to_private=to_private)
    changed = {*range(5), *range(8, 12)}
    assert set(pair.private_pages()) == (changed if to_private else set(range(SIZE)) - changed)


@pytest.mark.parametrize("to_private", [True, False])
@pytest.mark.parametrize("left", [SIZE, 1], ids=["all changes sides", "little does"])
async def test_others_have_their_turn_between_chunks(
    pair: Pair, monkeypatch: pytest.MonkeyPatch, to_private: bool, left: int
) -> None:
    """Also where no chunk is long: a range may be of tebibytes, with a page here and there."""
    await pair.convert(pages(0, SIZE), to_private=not to_private)
    if left < SIZE:
        await pair.convert(pages(0, SIZE - left), to_private=to_private)
    monkeypatch.setattr("memfs.store.chunks.CHUNK", 1)
    iterations = Iterations()
    trio.lowlevel.add_instrument(iterations)
    await pair.convert(pages(0, SIZE), to_private=to_private)
    assert iterations.count
    trio.lowlevel.remove_instrument(iterations)


async def test_many_ranges_are_more_work_than_one(pair: Pair) -> None:
    for file in (pair.shared, pair.private):
        await file.truncate(at(4 * MAX_RANGES))
    before = Turns.here().total
    await pair.convert(one(0), to_private=False)
    assert Turns.here().total == before
    await pair.convert(*(one(2 * number) for number in range(MAX_RANGES)), to_private=False)
    assert Turns.here().total > before + 10


async def test_opposite_calls_do_not_wait_for_each_other(pair: Pair) -> None:
    """Locks have an order, whichever way pages go."""
    pair.own()
    with trio.fail_after(10):
        async with trio.open_nursery() as nursery:
            for index in range(64):
                nursery.start_soon(functools.partial(pair.convert, one(index % 4), to_private=bool(index % 2)))
    assert len(pair.machine.heard) == len(pair.machine.ends)


# -- content that is kept ------------------------------------------------------------------------------------------


async def test_content_is_kept_where_the_owner_allows_it(pair: Pair) -> None:
    pair.own(preserves=True)
    pair.private.initial_image().launch()
    pair.write(0, 1, 5)
    await pair.convert(pages(0, 3), one(5), to_private=True, preserve=True)
    assert os.pread(pair.private.fd, 3 * PAGE_SIZE, 0) == 2 * CONTENT + bytes(PAGE_SIZE)
    assert (pair.private_pages(), pair.shared.pages) == ([0, 1, 2, 5], 0)
    os.pwrite(pair.private.fd, b"other".ljust(PAGE_SIZE, b"-"), at(1))
    pair.write(2)  # by the host, to memory that it should not use
    await pair.convert(pages(0, 6), to_private=False, preserve=True)
    expected = CONTENT + b"other".ljust(PAGE_SIZE, b"-") + bytes(3 * PAGE_SIZE) + CONTENT
    assert os.pread(pair.shared.fd, 6 * PAGE_SIZE, 0) == expected
    assert (pair.private_pages(), pair.shared.pages) == ([], 4)


@pytest.mark.parametrize("to_private", [True, False])
async def test_content_is_kept_nowhere_else(pair: Pair, to_private: bool) -> None:
    pair.write(*range(4))
    await pair.private.allocate(at(4), at(4), keep_size=True)
    before = pair.state
    with raises(errno.EPERM):
        await pair.convert(pages(2, 6), to_private=to_private, preserve=True)
    pair.own()
    with raises(errno.EPERM):
        await pair.convert(pages(2, 6), to_private=to_private, preserve=True)
    pair.private.unbind()
    pair.private.bind(Registered(pair.machine, PRIVATE, preserves=True))
    if to_private:
        with raises(errno.EBUSY):
            await pair.convert(pages(2, 6), to_private=to_private, preserve=True)
    assert pair.state == before


# -- what is refused -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("to_private", [True, False])
async def test_past_the_end_of_either_file(pair: Pair, to_private: bool) -> None:
    pair.own()
    pair.write(0, 1)
    for file in (pair.shared, pair.private):
        await file.truncate(at(SIZE - 1))
        before = pair.state
        with raises(errno.EINVAL, match="past the end"):
            await pair.convert(one(0), one(SIZE - 1), to_private=to_private)
        assert pair.state == before
        await file.truncate(at(SIZE))


@pytest.mark.parametrize("seal", [seals.F_SEAL_WRITE, F_SEAL_FUTURE_WRITE])
@pytest.mark.parametrize("of", ["shared", "private"])
async def test_seals(pair: Pair, seal: int, of: str) -> None:
    """What cannot be punched is not left, and what cannot be written to is not zeroed."""
    pair.write(*range(4))
    await pair.private.allocate(at(8), at(4), keep_size=True)
    await (pair.shared if of == "shared" else pair.private).add_seals(seal)
    pair.own()
    for to_private in (True, False):
        before = pair.state
        if of == "private" and to_private:
            await pair.convert(one(0), to_private=True)
            continue
        with raises(errno.EPERM):
            await pair.convert(one(0), one(8), to_private=to_private)
        assert pair.state == before


async def test_files_that_are_no_pair(pair: Pair) -> None:
    pair.write(*range(4))
    other = File(pair.backing, 5, F_SEAL_GUEST)
    before = pair.state
    for shared, private in (
        *((pair.shared, pair.shared), (pair.private, pair.private), (pair.private, pair.shared)),
        (other, pair.private),
    ):
        for to_private in (True, False):
            with raises(errno.EINVAL):
                await convert(shared, private, PageRanges.of([one(0)]), to_private=to_private)
    assert pair.state == before
    other.close()


@pytest.mark.parametrize("to_private", [True, False])
async def test_owners(pair: Pair, to_private: bool) -> None:
    """Of one file only: it hears of that one. Two owners: nothing happens."""
    pair.write(*range(4))
    await pair.private.allocate(at(8), at(4), keep_size=True)
    await pair.convert(one(0), one(8), to_private=to_private)
    other = Machine()
    for bound, ids in ((pair.shared, (SHARED, NO_FILE)), (pair.private, (NO_FILE, PRIVATE))):
        number = SHARED if bound is pair.shared else PRIVATE
        bound.bind(Registered(pair.machine, number))
        await pair.convert(one(number), one(number + 8), to_private=to_private)
        assert pair.machine.heard[-1][:2] == ids
        bound.unbind()
    pair.shared.bind(Registered(pair.machine, SHARED))
    pair.private.bind(Registered(other, PRIVATE))
    before = pair.state
    with raises(errno.EPERM):
        await pair.convert(one(3), one(11), to_private=to_private)
    assert (pair.state, other.heard) == (before, [])


async def test_owner_that_is_fenced_meanwhile(pair: Pair) -> None:
    """The conversion goes on as if it had never been there."""
    pair.own()
    pair.write(*range(4))
    pair.machine.may_go_on = trio.Event()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(functools.partial(pair.convert, pages(0, 4), to_private=True))
        await wait_all_tasks_blocked()
        pair.shared.unbind()
        pair.private.unbind()
        pair.machine.may_go_on.set()
    assert (pair.private_pages(), pair.shared.pages) == ([0, 1, 2, 3], 0)


async def test_measurement_shows_what_left_private_memory_before_the_launch(pair: Pair) -> None:
    image = pair.private.initial_image()
    await pair.private.allocate(at(0), at(4), keep_size=True)
    before = image.measurement
    await pair.convert(one(8), to_private=False)
    assert image.measurement == before, "nothing has left"
    await pair.convert(one(1), to_private=False)
    by_conversion = image.measurement
    assert by_conversion != before
    await pair.convert(PageRange(PageIndex(1), PageIndex(2)), to_private=True)
    assert image.measurement == by_conversion
