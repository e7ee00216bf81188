"""A file and its owner: in which order pages come and go, whatever fails on the way."""

from __future__ import annotations

import errno
import os
import resource
import threading
from collections.abc import Callable, Iterator

import pytest
import trio
from trio.testing import wait_all_tasks_blocked

from memfs.contract.page_map import MAX_PAGES
from memfs.contract.page_ranges import PageRanges
from memfs.contract.protocol.messages import FileId
from memfs.contract.sys.libc import PUNCH_HOLE, fallocate
from memfs.contract.units import PAGE_SIZE, ByteOffset, PageRange
from memfs.store.backing import Backing
from memfs.store.chunks import SHORT
from memfs.store.file import File
from memfs.store.measurement import InitialImage
from memfs.store.memfd_backing import MemfdBacking
from memfs.store.seals import F_SEAL_GUEST, F_SEAL_SEAL, F_SEAL_SHRINK
from memfs.store.tmpfs_backing import TmpfsBacking
from tests.helpers import at, new_backing, not_none, pages, raises

LIMIT = 32 * PAGE_SIZE


@pytest.fixture(params=[TmpfsBacking, MemfdBacking])
def backing(request: pytest.FixtureRequest) -> Iterator[Backing]:
    backing = new_backing(request.param, LIMIT)
    yield backing
    backing.close()


class Recorder:
    """An owner that writes down what it is told, and what the file was like at that moment."""

    id = FileId(1)
    preserves = False

    def __init__(self, file: File) -> None:
        self.file = file
        self.heard: list[tuple[str, PageRange, int]] = []
        self.may_go_on = trio.Event()
        self.may_go_on.set()

    @property
    def owner(self) -> Recorder:
        return self

    async def convert_begin(self, shared: FileId, private: FileId, ranges: PageRanges, *, to_private: bool) -> None:
        raise AssertionError("a conversion")

    async def convert_end(self, shared: FileId, private: FileId, done: PageRanges, *, to_private: bool) -> None:
        raise AssertionError("a conversion")

    async def _hear(self, what: str, pages: PageRange) -> None:
        self.heard.append((what, pages, self.file.pages))
        with trio.CancelScope(shield=True):  # as GuestOps has it
            await self.may_go_on.wait()

    async def invalidate_begin(self, pages: PageRange) -> None:
        await self._hear("begin", pages)

    async def invalidate_end(self, pages: PageRange) -> None:
        await self._hear("end", pages)

    async def fallocate(self, pages: PageRange) -> None:
        await self._hear("fallocate", pages)


@pytest.fixture
def guest(backing: Backing) -> Iterator[File]:
    """A guest-sealed file of 16 pages, all allocated."""
    file = File(backing, 1, F_SEAL_GUEST)
    trio.run(file.truncate, at(16))

    async def allocate() -> None:
        await file.allocate(at(0), at(16), keep_size=False)

    trio.run(allocate)
    with file.held():
        yield file
    file.check()
    file.unbind()
    file.close()
    assert backing.free_pages == backing.total_pages


async def test_owner_hears_before_and_after_pages_go(guest: File) -> None:
    owner = Recorder(guest)
    guest.bind(owner)
    await guest.punch(at(2), at(3))
    await guest.truncate(at(8))
    await guest.allocate(at(2), at(2), keep_size=True)
    assert owner.heard == [
        ("begin", pages(2, 5), 16),
        ("end", pages(2, 5), 13),
        ("begin", pages(8, 16), 13),
        ("end", pages(8, 16), 5),
        ("fallocate", pages(2, 4), 7),
    ]


async def test_end_follows_begin_also_when_freeing_fails(guest: File, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(fd: int, mode: int, offset: int, length: int) -> None:
        raise OSError(errno.EIO, "told to fail")

    owner = Recorder(guest)
    guest.bind(owner)
    monkeypatch.setattr("memfs.store.pages.fallocate", fail)
    for attempt in (guest.punch(at(0), at(1)), guest.allocate(at(16), at(1), keep_size=False)):
        with raises(errno.EIO):
            await attempt
    assert owner.heard == [("begin", pages(0, 1), 16), ("end", pages(0, 1), 16)]
    guest.check()


async def test_second_change_waits_for_the_first(guest: File) -> None:
    owner = Recorder(guest)
    guest.bind(owner)
    owner.may_go_on = trio.Event()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(guest.punch, at(0), at(1))
        await wait_all_tasks_blocked()
        nursery.start_soon(guest.punch, at(1), at(1))
        await wait_all_tasks_blocked()
        assert owner.heard == [("begin", pages(0, 1), 16)]
        owner.may_go_on.set()
    assert [what for what, *_ in owner.heard] == ["begin", "end", "begin", "end"]


async def test_who_waits_can_be_interrupted_and_who_runs_cannot(guest: File) -> None:
    owner = Recorder(guest)
    guest.bind(owner)
    owner.may_go_on = trio.Event()
    async with trio.open_nursery() as nursery:
        running, waiting = trio.CancelScope(), trio.CancelScope()

        async def punch(scope: trio.CancelScope, page: int) -> None:
            with scope:
                await guest.punch(at(page), at(1))

        nursery.start_soon(punch, running, 0)
        await wait_all_tasks_blocked()
        nursery.start_soon(punch, waiting, 1)
        await wait_all_tasks_blocked()
        running.cancel()
        waiting.cancel()
        await wait_all_tasks_blocked()
        assert waiting.cancelled_caught
        owner.may_go_on.set()
    assert owner.heard == [("begin", pages(0, 1), 16), ("end", pages(0, 1), 15)]


@pytest.mark.parametrize(
    ("offset", "length"), [(1, PAGE_SIZE), (0, 1), (PAGE_SIZE, PAGE_SIZE + 1), (PAGE_SIZE - 1, PAGE_SIZE)]
)
async def test_unaligned_changes_of_guest_memory_are_refused(guest: File, offset: int, length: int) -> None:
    owner = Recorder(guest)
    guest.bind(owner)
    for attempt in (
        guest.punch(ByteOffset(offset), length),
        guest.allocate(ByteOffset(offset), length, keep_size=True),
        guest.truncate(length if length % PAGE_SIZE else offset),
    ):
        with raises(errno.EINVAL):
            await attempt
    assert (owner.heard, guest.pages, guest.size) == ([], 16, at(16))


async def test_full_memory_refuses_the_whole_allocation(guest: File, backing: Backing) -> None:
    owner = Recorder(guest)
    guest.bind(owner)
    with raises(errno.ENOSPC):
        await guest.allocate(at(8), at(40), keep_size=False)
    assert (owner.heard, guest.pages, guest.size) == ([], 16, at(16))
    assert backing.free_pages == 16
    with raises(errno.EFBIG):
        await guest.truncate((MAX_PAGES + 1) * PAGE_SIZE)


async def test_content_of_guest_memory_is_out_of_reach(guest: File) -> None:
    for attempt in (lambda: guest.read(at(0), 1), lambda: guest.write(at(0), b"x")):
        with pytest.raises(PermissionError):
            attempt()


async def test_present_says_what_is_allocated(guest: File) -> None:
    await guest.punch(at(3), at(2))
    async with guest.locked():
        runs = list(guest.allocation_runs(pages(2, 7)))
        assert runs == [(pages(2, 3), True), (pages(3, 5), False), (pages(5, 7), True)]
        await guest.ensure_allocated(pages(3, 4))
        assert list(guest.allocation_runs(pages(3, 5))) == [(pages(3, 4), True), (pages(4, 5), False)]


async def test_guest_seal_takes_an_empty_file_that_nobody_can_have_mapped(backing: Backing) -> None:
    file = File(backing, 1)
    file.hold()
    file.write(at(0), b"content")
    old = file.fd, file.stat().st_ino
    in_the_way: tuple[Callable[[], object], ...] = (
        lambda: None,
        lambda: file.opens.add(writable=False),
        lambda: file.bind(Recorder(file)),
    )
    for prepare in in_the_way:
        prepare()
        with raises(errno.EBUSY):
            await file.add_seals(F_SEAL_GUEST)
        assert (file.seals, (file.fd, file.stat().st_ino)) == (0, old)
        await file.truncate(0)
    file.opens.remove(writable=False)
    file.unbind()
    times = file.stat().st_mtime_ns
    keeper = os.dup(file.fd)
    await file.add_seals(F_SEAL_GUEST)
    assert os.fstat(keeper).st_ino != file.stat().st_ino or os.fstat(keeper).st_dev != file.stat().st_dev
    os.close(keeper)
    assert file.stat().st_mtime_ns == times
    await file.add_seals(F_SEAL_GUEST | F_SEAL_SEAL)
    with pytest.raises(PermissionError):
        await file.add_seals(0)
    with pytest.raises(PermissionError):
        await file.add_seals(F_SEAL_GUEST)
    file.release()
    file.close()


def descriptors() -> int:
    return len(os.listdir("/proc/self/fd"))


def test_a_file_that_nobody_uses_takes_no_descriptor() -> None:
    backing = new_backing(TmpfsBacking, LIMIT)
    file, before = File(backing, 1), descriptors()
    with file.held(), file.held():
        file.write(at(0), b"content")
        assert descriptors() == before + 1
    file.set_times(5, 7)
    assert (file.stat().st_mtime_ns, file.size, descriptors()) == (7, 7, before)
    with file.held():
        assert file.read(at(0), 10) == b"content"
    file.close()
    backing.close()


def test_without_a_descriptor_left_nothing_is_held() -> None:
    backing = new_backing(TmpfsBacking, LIMIT)
    file = File(backing, 1)
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (3, hard))
    try:
        with raises(errno.EMFILE):
            file.hold()
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    with file.held():
        file.write(at(0), b"x")
    file.close()  # which a hold that was left would forbid
    backing.close()


async def test_unknown_seals_are_refused(backing: Backing) -> None:
    file = File(backing, 1)
    with raises(errno.EINVAL):
        await file.add_seals(F_SEAL_GUEST | 1 << 20)
    assert file.seals == 0
    file.close()


async def test_truncating_to_the_same_size_frees_what_lies_beyond(backing: Backing) -> None:
    """As on tmpfs, where KEEP_SIZE allocates past the end and any truncate that does not grow frees that again."""
    for seals in (0, F_SEAL_GUEST):
        file = File(backing, 1, seals)
        await file.truncate(at(1))
        await file.allocate(at(0), at(8), keep_size=True)
        await file.truncate(at(1))
        assert file.pages == 1
        file.check()
        assert backing.free_pages == 31
        file.close()


async def test_short_call_is_made_at_once_unless_it_is_somebody_else_s_business() -> None:
    backing, accounted = TmpfsBacking(LIMIT), MemfdBacking(LIMIT)
    file, tracked = File(backing, 1), File(accounted, 2)

    def is_done(which: File, length: int = PAGE_SIZE) -> bool:
        return all(which.fallocate_now(mode, at(1), length) for mode in (0, PUNCH_HOLE))

    assert not is_done(file), "nobody holds it"
    with file.held(), tracked.held():
        assert file.fallocate_now(0, at(1), PAGE_SIZE)
        assert (file.size, file.pages) == (at(2), 1)
        assert file.fallocate_now(PUNCH_HOLE, at(1), PAGE_SIZE)
        assert (file.size, file.pages) == (at(2), 0)
        assert not is_done(file, SHORT + 1)
        assert not is_done(tracked)
        async with file.locked():
            assert not is_done(file)
        assert is_done(file)
        for number in range(31):
            assert file.fallocate_now(0, at(number), PAGE_SIZE)
        file.fallocate_now(0, at(31), PAGE_SIZE)
        assert not file.fallocate_now(0, at(40), PAGE_SIZE), "what is being freed has to be waited for"
        with raises(errno.EINVAL):
            file.fallocate_now(0, at(1), 0)
        file.bind(Recorder(file))
        assert not is_done(file)
        file.unbind()
        assert file.fallocate_now(PUNCH_HOLE, at(1), PAGE_SIZE)
        await file.add_seals(F_SEAL_SHRINK)
        assert not is_done(file)
    for each in (file, tracked):
        each.close()
    backing.close()
    accounted.close()


async def test_untracked_file_shrinks_from_beyond_any_page_map() -> None:
    backing = new_backing(TmpfsBacking, LIMIT)
    file = File(backing, 1)
    for size in (1 << 62, 1 << 60, 1 << 60, 0):
        await file.truncate(size)
        assert file.size == size
    file.close()
    backing.close()


async def test_write_during_a_long_punch_is_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a punch that ran in a thread nobody could say whether it freed what was written meanwhile."""
    backing = MemfdBacking(64 << 20)
    file = File(backing, 1)
    file.hold()
    await file.truncate(16 << 20)

    def free_and_let_others_go_on(fd: int, mode: int, offset: int, length: int) -> None:
        fallocate(fd, mode, offset, length)
        if threading.current_thread() is not threading.main_thread():
            trio.from_thread.run_sync(file.write, at(5), b"x")

    monkeypatch.setattr("memfs.store.pages.fallocate", free_and_let_others_go_on)
    await file.punch(at(0), 16 << 20)
    file.check()
    file.write(at(5), b"x")
    file.check()
    file.release()
    file.close()
    assert backing.free_pages == backing.total_pages
    backing.close()


async def test_guest_file_that_nobody_holds_takes_no_descriptor() -> None:
    """Nor does it lose count of its pages, until they are many."""
    backing = new_backing(TmpfsBacking, 64 << 20)
    before = len(os.listdir("/proc/self/fd"))
    files = [File(backing, number, F_SEAL_GUEST) for number in range(1, 33)]
    for file in files:
        with file.held():
            await file.truncate(at(16))
            await file.allocate(at(2), at(3), keep_size=True)
            await file.allocate(at(8), at(1), keep_size=True)
        file.check()
    assert len(os.listdir("/proc/self/fd")) == before
    for file in files:
        with file.held():
            page_map = not_none(file.page_map)
            assert list(page_map.runs(pages(0, 16))) == [pages(2, 5), pages(8, 9)]
            await file.punch(at(3), at(1))
        file.check()
        assert file.pages == 3
        file.close()
    assert len(os.listdir("/proc/self/fd")) == before
    assert backing.free_pages == backing.total_pages
    fragmented = File(backing, 1, F_SEAL_GUEST)
    with fragmented.held():
        await fragmented.truncate(at(2000))
        for page in range(0, 2000, 2):
            await fragmented.allocate(at(page), at(1), keep_size=True)
    fragmented.check()
    fragmented.close()
    assert len(os.listdir("/proc/self/fd")) == before
    assert backing.free_pages == backing.total_pages
    backing.close()


async def test_an_image_that_was_final_stays_so_and_another_shows_that_the_daemon_died() -> None:
    images = [InitialImage(), InitialImage()]
    for image in images:
        image.owner_left()
    images[1].launch()
    before = images[0].measurement
    opened, launched = (InitialImage.of_before(image.state, lambda: None) for image in images)
    assert (opened.launched, launched.launched) == (False, True)
    assert before not in (opened.measurement, InitialImage.of_before(b"", lambda: None).measurement)
    assert InitialImage.of_before(b"", lambda: None).measurement != InitialImage().measurement
    changes = list[int]()
    image = InitialImage(lambda: changes.append(1))
    image.launch()
    image.launch()
    assert len(changes) == 1
