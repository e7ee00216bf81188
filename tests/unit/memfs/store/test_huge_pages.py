"""Guest-sealed files on huge pages: nothing but whole ones comes and goes, and nothing that is not accounted for."""

from __future__ import annotations

import ctypes
import errno
import fcntl
import mmap
import os
import struct
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest
import trio

from memfs.contract.sys.hugetlb import Pool
from memfs.contract.sys.libc import FALLOC_FL_PUNCH_HOLE, MAP_NORESERVE, fallocate
from memfs.contract.units import PAGE_SIZE, ByteOffset
from memfs.owners.populate import populate
from memfs.store import chunks
from memfs.store.file import File
from memfs.store.guest_mounts import GuestTmpfs
from memfs.store.seals import F_SEAL_GUEST
from memfs.store.tmpfs_backing import TmpfsBacking
from tests.helpers import at, not_none, pages, raises
from tests.huge_pages import SIZE_2M, huge_pages, taken_but

from .test_file import Recorder

HUGE = SIZE_2M // PAGE_SIZE


@pytest.fixture
def pool() -> Iterator[Pool]:
    with huge_pages(40) as pool:
        yield pool


@pytest.fixture
def backing(pool: Pool) -> Iterator[TmpfsBacking]:
    """A backing of 64 MiB, of which guest-sealed files lie on huge pages; in the end the pool is as it was."""
    free = pool.free
    backing = hugetlb_backing()
    yield backing
    backing.close()
    assert pool.free == free


def hugetlb_backing(min_size: int = 0) -> TmpfsBacking:
    try:
        return TmpfsBacking(64 << 20, {}, SIZE_2M, min_size)
    except PermissionError as error:
        pytest.skip(f"no detached hugetlbfs: {error.strerror}")


@pytest.fixture
def guest(backing: TmpfsBacking) -> Iterator[File]:
    """A guest-sealed file of 64 MiB, empty."""
    file = File(backing, 1, F_SEAL_GUEST)
    trio.run(file.truncate, 64 << 20)
    with file.held():
        yield file
        file.check()
    file.unbind()
    file.close()
    assert backing.used_pages == 0


def has(file: File) -> list[int]:
    """Return the numbers of the huge pages that a file has, which the map shows whole."""
    runs = [(run.start, run.end) for run in not_none(file.page_map).runs(pages(0, 32 * HUGE))]
    assert not any(edge % HUGE for run in runs for edge in run)
    return [number for start, end in runs for number in range(start // HUGE, end // HUGE)]


async def allocate(file: File, first: int, count: int) -> None:
    await file.allocate(at(first * HUGE), count * SIZE_2M, keep_size=True)


async def test_huge_pages_come_out_of_the_pool_and_go_back(guest: File, pool: Pool, backing: TmpfsBacking) -> None:
    free = pool.free
    assert guest.granule == SIZE_2M
    await allocate(guest, 1, 3)
    assert (has(guest), guest.pages, pool.free, backing.used_pages) == ([1, 2, 3], 3 * HUGE, free - 3, 3 * HUGE)
    await guest.punch(at(2 * HUGE), SIZE_2M)
    assert (has(guest), guest.pages, pool.free, backing.used_pages) == ([1, 3], 2 * HUGE, free - 2, 2 * HUGE)
    await guest.truncate(3 * SIZE_2M)
    assert (has(guest), guest.pages, pool.free, backing.used_pages) == ([1], HUGE, free - 1, HUGE)


@pytest.mark.parametrize(("offset", "length"), [(0, 4096), (4096, SIZE_2M), (SIZE_2M, SIZE_2M + 4096), (1, SIZE_2M)])
async def test_what_is_no_huge_page_is_refused(guest: File, offset: int, length: int) -> None:
    owner = Recorder(guest)
    await allocate(guest, 0, 2)
    guest.bind(owner)
    for attempt in (
        guest.punch(ByteOffset(offset), length),
        guest.allocate(ByteOffset(offset), length, keep_size=False),
        guest.truncate(offset + length),
    ):
        with raises(errno.EINVAL):
            await attempt
    assert (owner.heard, has(guest), guest.size) == ([], [0, 1], 64 << 20)


@pytest.fixture(params=[False, True], ids=["known before", "taken meanwhile"])
def too_small(
    request: pytest.FixtureRequest, pool: Pool, guest: File, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Callable[[], bool]]:
    """A function that has the pool be too small for a file; true if others take pages when it allocates."""
    with ExitStack() as taken:

        def take() -> None:
            taken.enter_context(taken_but(pool, 6))

        def take_and_allocate(fd: int, mode: int, offset: int, length: int) -> None:
            if not mode & FALLOC_FL_PUNCH_HOLE and pool.available > 6:
                take()
            fallocate(fd, mode, offset, length)

        def later() -> bool:
            if request.param:
                monkeypatch.setattr("memfs.store.pages.fallocate", take_and_allocate)
            else:
                take()
            return bool(request.param)

        yield later


async def test_nothing_remains_of_an_allocation_for_which_the_pool_is_too_small(
    guest: File, too_small: Callable[[], bool]
) -> None:
    """The kernel leaves what it got; what the file had stays, and so does its content."""
    owner = Recorder(guest)
    await allocate(guest, 3, 1)
    guest.bind(owner)
    write(guest, 3 * SIZE_2M, b"content")
    too_small()
    with raises(errno.ENOSPC):
        await guest.allocate(at(0), 64 << 20, keep_size=False)
    assert (owner.heard, has(guest), guest.pages, guest.size) == ([], [3], HUGE, 64 << 20)
    assert os.pread(guest.fd, 7, 3 * SIZE_2M) == b"content"


async def test_chunks_that_are_done_are_undone_and_the_owner_knows(
    guest: File, too_small: Callable[[], bool], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The map has shown them as private, so that the owner may have mapped them."""
    monkeypatch.setattr(chunks, "CHUNK", 2 * HUGE)
    owner = Recorder(guest)
    await allocate(guest, 1, 1)
    guest.bind(owner)
    is_begun = too_small()
    with raises(errno.ENOSPC):
        await guest.allocate(at(0), 64 << 20, keep_size=False)
    if is_begun:  # five that it had not are undone, between them the one that it had
        assert owner.heard == [("begin", pages(0, 6 * HUGE), 6 * HUGE), ("end", pages(0, 6 * HUGE), HUGE)]
    else:
        assert owner.heard == []
    assert (has(guest), guest.pages) == ([1], HUGE)


async def test_ordinary_and_huge_pages_share_one_limit(backing: TmpfsBacking, guest: File) -> None:
    file = File(backing, 2)
    with file.held():
        await file.allocate(at(0), (64 << 20) - SIZE_2M - PAGE_SIZE, keep_size=False)
        await allocate(guest, 0, 1)
        assert backing.free_pages == 1
        with raises(errno.ENOSPC):
            await allocate(guest, 1, 1)
        with raises(errno.ENOSPC):
            await file.allocate(at(0), (64 << 20) - SIZE_2M + PAGE_SIZE, keep_size=False)
        await guest.punch(at(0), SIZE_2M)
        await file.allocate(at(0), 64 << 20, keep_size=False)
    file.close()


async def test_what_is_reserved_is_kept_for_guests(pool: Pool) -> None:
    """In the pool, and within the limit; statfs(2) can say so."""
    reserved = pool.reserved
    backing = hugetlb_backing(min_size=3 * SIZE_2M - 5)
    assert (pool.reserved, backing.used_pages, backing.free_pages) == (reserved + 3, 0, 29 * HUGE)
    file, guest = File(backing, 1), File(backing, 2, F_SEAL_GUEST)
    with file.held(), guest.held():
        with raises(errno.ENOSPC):
            await file.allocate(at(0), 59 << 20, keep_size=False)
        await file.allocate(at(0), 58 << 20, keep_size=False)
        await guest.allocate(at(0), 3 * SIZE_2M, keep_size=False)
        assert (pool.reserved, backing.used_pages, backing.free_pages) == (reserved, 32 * HUGE, 0)
        for size in (58 << 20, 4 << 20):
            with raises(errno.EINVAL):
                backing.resize(size)
        await guest.truncate(0)
        await file.truncate(0)
        assert pool.reserved == reserved + 3
        with raises(errno.EINVAL):
            backing.resize(4 << 20)
        backing.resize(6 << 20)
        assert backing.free_pages == 0
    file.close()
    guest.close()
    backing.close()
    assert pool.reserved == reserved


async def test_initial_content_of_a_huge_page(guest: File) -> None:
    """As on other files, and the owner is told of all that is allocated."""
    content = os.urandom(3 * PAGE_SIZE)
    source = os.memfd_create("source", os.MFD_ALLOW_SEALING)
    os.write(source, content)
    fcntl.fcntl(source, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK)
    owner = Recorder(guest)
    guest.bind(owner)
    measured = await populate(guest, pages(HUGE - 1, HUGE + 2), source, ByteOffset(0))
    assert os.pread(guest.fd, len(content), SIZE_2M - PAGE_SIZE) == content
    assert (has(guest), owner.heard) == ([0, 1], [("fallocate", pages(0, 2 * HUGE), 2 * HUGE)])
    guest.unbind()
    ordinary = File(TmpfsBacking(1 << 26), 1, F_SEAL_GUEST)
    await ordinary.truncate(1 << 26)
    assert await populate(ordinary, pages(HUGE - 1, HUGE + 2), source, ByteOffset(0)) == measured
    ordinary.close()
    os.close(source)


async def test_an_owner_that_shrinks_the_file_kills_nobody(guest: File, monkeypatch: pytest.MonkeyPatch) -> None:
    """By its own descriptor, while content is being copied in."""
    source = os.memfd_create("source", os.MFD_ALLOW_SEALING)
    os.ftruncate(source, SIZE_2M)
    fcntl.fcntl(source, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK)
    preadv = os.preadv

    def shrink_and_read(fd: int, buffers: list[memoryview], offset: int) -> int:
        os.ftruncate(guest.fd, 0)
        return preadv(fd, buffers, offset)

    monkeypatch.setattr(os, "preadv", shrink_and_read)
    with raises(errno.EFAULT):
        await populate(guest, pages(0, 5), source, ByteOffset(0))
    monkeypatch.undo()
    os.close(source)
    await guest.truncate(0)


def write(file: File, offset: int, content: bytes) -> None:
    """Write through a mapping, as an owner does: hugetlbfs has no write(2)."""
    with mmap.mmap(file.fd, 64 << 20, mmap.MAP_SHARED | MAP_NORESERVE) as memory:
        memory[offset : offset + len(content)] = content


# -- on a tmpfs that gives huge pages ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("start", "end"),
    [(0, 1), (511, 513), (0, HUGE), (5, 3 * HUGE), (HUGE, 3 * HUGE + 1), (3, 2 * HUGE - 3), (1, 8 * HUGE - 1)],
)
async def test_guest_memory_gets_the_pages_that_were_asked_for(start: int, end: int) -> None:
    """Of a tmpfs with huge=always, too; and whole blocks of 2 MiB are huge."""
    try:
        backing = TmpfsBacking(64 << 20, {"huge": "always"})
    except OSError as error:
        pytest.skip(f"no detached tmpfs with huge pages: {error.strerror}")
    free = backing.free_pages
    guest = File(backing, 1, F_SEAL_GUEST)
    with guest.held():
        await guest.truncate(16 << 20)
        await guest.allocate(at(start), at(end - start), keep_size=True)
        assert guest.pages == end - start
        assert backing.free_pages == free - (end - start)
        await guest.punch(at(start), PAGE_SIZE)
        assert guest.pages == end - start - 1
        async with guest.locked():
            await guest.ensure_allocated(pages(start, end))
        guest.check()
        assert os.fstat(guest.fd).st_blksize == SIZE_2M, "huge pages are still wanted"
    guest.close()
    assert backing.free_pages == free
    backing.close()


def test_whole_blocks_are_huge_pages() -> None:
    """The kernel says so of a mapping of them."""
    try:
        mount = GuestTmpfs(64 << 20, {"huge": "always"})
    except OSError as error:
        pytest.skip(f"no detached tmpfs with huge pages: {error.strerror}")
    if "[deny]" in Path("/sys/kernel/mm/transparent_hugepage/shmem_enabled").read_text():
        pytest.skip("huge pages of tmpfs are denied")
    os.mknod("file", 0o600, dir_fd=mount.root)
    fd = os.open("file", os.O_RDWR, dir_fd=mount.root)
    steps = []
    for start, length, within in mount.steps(at(1), 8 << 20):
        with within:
            fallocate(fd, 0, start, length)
        steps.append((start, length))
    assert steps == [(4096, SIZE_2M - 4096), (SIZE_2M, 3 * SIZE_2M), (4 * SIZE_2M, 4096)]
    with mmap.mmap(fd, 0) as memory:
        memory[::PAGE_SIZE] = bytes(len(memory) // PAGE_SIZE)
        assert huge_pages_in(memory) >= 3 * HUGE  # khugepaged may have made more
    os.close(fd)
    mount.close()


def huge_pages_in(memory: mmap.mmap) -> int:
    """Return how many pages of a mapping are parts of huge ones (linux/kernel-page-flags.h)."""
    first = ctypes.c_char.from_buffer(memory)
    try:
        with open("/proc/self/pagemap", "rb") as pagemap, open("/proc/kpageflags", "rb", buffering=0) as flags:
            pagemap.seek(ctypes.addressof(first) // PAGE_SIZE * 8)
            entries = struct.unpack(f"={len(memory) // PAGE_SIZE}Q", pagemap.read(len(memory) // PAGE_SIZE * 8))
            frames = [entry & ((1 << 55) - 1) for entry in entries]
            return sum(int.from_bytes(os.pread(flags.fileno(), 8, 8 * frame), "little") >> 22 & 1 for frame in frames)
    except PermissionError:
        pytest.skip("only root may see which pages are huge")
    finally:
        del first
