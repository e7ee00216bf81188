"""Guest-sealed files on real huge pages, and on a tmpfs that gives some: what they take, say and give back."""

from __future__ import annotations

import errno
import os
import random
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import trio

from memfs.contract.conversion import convert, key_of
from memfs.contract.page_map import PageMapView
from memfs.contract.protocol.messages import Failed, Fallocate, GetPfn, InvalidateBegin, InvalidateEnd, PfnReply
from memfs.contract.protocol.peer import close_all
from memfs.contract.sys.hugetlb import Pool
from memfs.contract.sys.libc import FALLOC_FL_KEEP_SIZE, PUNCH_HOLE, fallocate
from memfs.contract.units import PAGE_SIZE
from tests.helpers import pages, raises, until
from tests.huge_pages import SIZE_1G, SIZE_2M, huge_pages, taken_but

from .conftest import Memfs, MountMemfs, memfs_command, run, start_memfs, state_of
from .owner import connected, shell
from .tools import mount_namespace, skip_without_mount_namespace

HUGE = SIZE_2M // PAGE_SIZE
SHMEM_ENABLED = "/sys/kernel/mm/transparent_hugepage/shmem_enabled"


@pytest.fixture
def memfs(pool: Pool, mount_memfs: MountMemfs) -> Memfs:
    """A memfs of 64 MiB on huge pages."""
    return mount_memfs("size=64m,pagesize=2M")


@pytest.fixture
def private(memfs: Memfs) -> Path:
    """A guest-sealed file of 64 MiB, nothing of it allocated."""
    return make_private(memfs, 64 << 20)


def make_private(memfs: Memfs, size: int, name: str = "private") -> Path:
    path = memfs.path / name
    command = memfs_command("create", "--seals", "guest", "--size", str(size), path)
    subprocess.run(command, check=True)
    return path


def test_what_is_allocated_comes_out_of_the_pool_and_goes_back(memfs: Memfs, private: Path, pool: Pool) -> None:
    free = pool.free
    assert memfs.run("fallocate", "-o", "2M", "-l", "6M", "private").returncode == 0
    assert memfs.run("fallocate", "-p", "-o", "4M", "-l", "2M", "private").returncode == 0
    assert (pool.free, private.stat().st_blocks, private.stat().st_blksize) == (free - 2, 2 << 12, SIZE_2M)
    fd = os.open(private, os.O_RDONLY)
    places = [os.lseek(fd, 0, os.SEEK_DATA), os.lseek(fd, 2 << 20, os.SEEK_HOLE), os.lseek(fd, 5 << 20, os.SEEK_DATA)]
    os.close(fd)
    assert places == [2 << 20, 4 << 20, 6 << 20]
    assert memfs.run("df", "--output=used", ".").stdout.split()[-1] == str(4 << 10)
    said = state_of(memfs.path)
    assert [said[name] for name in ("guest_page_size", "guest_used", "pool", "pool_free", "min_size", "huge")] == [
        *(SIZE_2M, 4 << 20, pool.pages * SIZE_2M, (free - 2) * SIZE_2M, 0, "always")
    ]
    private.unlink()
    until(lambda: pool.free == free)


def test_what_is_no_huge_page_is_refused_and_changes_nothing(memfs: Memfs, private: Path) -> None:
    assert memfs.run("fallocate", "-l", "4M", "private").returncode == 0
    before = memfs.run("stat", "-c", "%s %b", "private").stdout
    for command in (
        *(("fallocate", "-l", "4K"), ("fallocate", "-o", "4K", "-l", "2M"), ("fallocate", "-o", "1M", "-l", "2M")),
        *(("fallocate", "-p", "-l", "4K"), ("fallocate", "-p", "-o", "2M", "-l", "1M")),
        *(("truncate", "-s", "3M"), ("truncate", "-s", "4097")),
    ):
        result = memfs.run(*command, "private")
        assert "Invalid argument" in result.stderr
        assert memfs.run("stat", "-c", "%s %b", "private").stdout == before
    create = memfs.run(*memfs_command("create", "--seals", "guest", "--size", "5m", "other"))
    assert create.stderr == "memfs: other: the size of a guest-sealed file here is a multiple of 2M\n"
    allocate = memfs.run(*memfs_command("allocate", "private", "--length", "1m"))
    assert allocate.stderr == "memfs: private: --length must be a multiple of 2M\n"
    assert not (memfs.path / "other").exists()
    memfs.run("truncate", "-s", "4M", "shared")
    convert = memfs.run(*memfs_command("convert", "--to", "private", "shared", "private", "4k:8k"))
    assert convert.stderr == "memfs: private: 4096:8192 is not whole huge pages: give multiples of 2M\n"


def test_full_pool_is_no_space_and_nothing_remains(memfs: Memfs, private: Path, pool: Pool) -> None:
    os.truncate(private, 32 << 20)
    with taken_but(pool, 5):
        assert "No space left" in memfs.run("fallocate", "-l", "32M", "private").stderr
        assert (private.stat().st_blocks, pool.free) == (0, 5)
        assert memfs.run("fallocate", "-l", "10M", "private").returncode == 0
        assert pool.free == 0
        (memfs.path / "ordinary").write_bytes(bytes(1 << 20))  # of which there is more
    assert memfs.run("fallocate", "-l", "32M", "private").returncode == 0


def test_conversion_is_of_whole_huge_pages(memfs: Memfs, private: Path, pool: Pool) -> None:
    free, path = pool.free, memfs.path / "shared"
    path.touch()
    os.truncate(path, 64 << 20)
    fds = [os.open(each, os.O_RDWR) for each in (path, private)]
    key = key_of(fds[0])
    os.pwrite(fds[0], b"lost", 4 << 20)
    for start, end in ((0, 1), (HUGE, 2 * HUGE + 1), (HUGE + 1, 2 * HUGE)):
        with raises(errno.EINVAL):
            convert(fds[1], key, [pages(start, end)], to_private=True)
    with raises(errno.EOPNOTSUPP):
        convert(fds[1], key, [pages(0, HUGE)], to_private=True, preserve=True)
    assert (pool.free, private.stat().st_blocks, os.pread(fds[0], 4, 4 << 20)) == (free, 0, b"lost")
    convert(fds[1], key, [pages(HUGE, 3 * HUGE), pages(5 * HUGE, 6 * HUGE)], to_private=True)
    assert (pool.free, private.stat().st_blocks, os.pread(fds[0], 4, 4 << 20)) == (free - 3, 3 << 12, bytes(4))
    with raises(errno.ENOSPC):
        convert(fds[1], key, [pages(0, 32 * HUGE)], to_private=True)
    assert (pool.free, private.stat().st_blocks) == (free - 3, 3 << 12)
    with raises(errno.EINVAL):
        convert(fds[1], key, [pages(HUGE, HUGE + 1)], to_private=False)
    convert(fds[1], key, [pages(0, 32 * HUGE)], to_private=False)
    assert (pool.free, private.stat().st_blocks) == (free, 0)
    for fd in fds:
        os.close(fd)


def test_two_mounts_share_one_pool(memfs: Memfs, mount_memfs: MountMemfs, pool: Pool) -> None:
    free = pool.free
    other = mount_memfs(f"size=64m,pagesize=2M,min_size={4 * SIZE_2M}")
    assert state_of(other.path)["min_size"] == 4 * SIZE_2M
    assert pool.reserved == 4
    make_private(memfs, 64 << 20)
    make_private(other, 64 << 20)
    assert "No space left" in memfs.run("fallocate", "-l", str((free - 3) * SIZE_2M), "private").stderr
    assert memfs.run("fallocate", "-l", str((free - 4) * SIZE_2M), "private").returncode == 0
    assert other.run("fallocate", "-l", str(4 * SIZE_2M), "private").returncode == 0
    assert "No space left" in other.run("fallocate", "-o", "32M", "-l", "2M", "private").stderr
    memfs.run("fallocate", "-p", "-l", "2M", "private")
    assert other.run("fallocate", "-o", "32M", "-l", "2M", "private").returncode == 0
    for each in (memfs, other):
        each.run("rm", "private")
    until(lambda: (pool.free, pool.reserved) == (free, 4))
    other.stop()
    until(lambda: (pool.free, pool.reserved) == (free, 0))


def test_reserve_that_cannot_be_had_is_no_mount(pool: Pool, tmp_path: Path) -> None:
    wanted = pool.available + 3
    with pytest.raises(AssertionError) as refused:
        start_memfs(tmp_path, f"pagesize=2M,min_size={wanted * SIZE_2M},size=1g")
    assert str(refused.value) == (
        f"memfs: option min_size={wanted * 2}M takes {wanted} pages of 2M; the pool has {pool.pages}, of which "
        f"{pool.available} can be had (echo {pool.pages + 3} > {pool.setting})\n"
    )
    assert pool.reserved == 0


async def test_owner_is_told_of_whole_huge_pages(memfs: Memfs, private: Path) -> None:
    async with connected(memfs.socket) as owner:
        registered, fds = await owner.registered(private)
        assert registered.granule == SIZE_2M
        page_map = PageMapView(fds[1])
        reply = await owner.ask(GetPfn(registered.file, pages(HUGE + 5, HUGE + 6), alloc=True, lock=False))
        assert isinstance(reply, PfnReply)
        (run_,) = reply.runs
        assert (run_.order, run_.pages, run_.pfn is not None and run_.pfn % HUGE) == (9, pages(HUGE + 5, HUGE + 6), 5)
        assert list(page_map.runs(pages(0, 32 * HUGE))) == [pages(HUGE, 2 * HUGE)], "the whole page is there"
        assert (await shell("fallocate", "-l", "8M", private, cwd=memfs.path)).returncode == 0
        everything = await owner.ask(GetPfn(registered.file, pages(0, 5 * HUGE), alloc=False, lock=False))
        assert isinstance(everything, PfnReply)
        assert [(each.pages, each.order) for each in everything.runs if each.pfn is not None] == [
            (pages(0, 4 * HUGE), 9)
        ]
        assert (await shell("fallocate", "-p", "-o", "2M", "-l", "4M", private, cwd=memfs.path)).returncode == 0
        assert owner.heard == [
            Fallocate(registered.file, pages(0, 4 * HUGE)),
            InvalidateBegin(registered.file, pages(HUGE, 3 * HUGE)),
            InvalidateEnd(registered.file, pages(HUGE, 3 * HUGE)),
        ]
        too_much = await owner.ask(GetPfn(registered.file, pages(0, 32 * HUGE), alloc=True, lock=False))
        assert isinstance(too_much, Failed)
        assert too_much.errno == errno.ENOSPC
        assert page_map.count(pages(0, 32 * HUGE)) == 2 * HUGE
        page_map.close()
        close_all(fds)


async def test_file_that_is_removed_while_registered(memfs: Memfs, private: Path, pool: Pool) -> None:
    """Its pages are the owner's until that has let go."""
    free = pool.free
    await shell("fallocate", "-l", "6M", private, cwd=memfs.path)
    async with connected(memfs.socket) as owner:
        _, fds = await owner.registered(private)
        await trio.to_thread.run_sync(private.unlink)
        await trio.sleep(0.2)
        assert pool.free == free - 3
        close_all(fds)
    await trio.to_thread.run_sync(until, lambda: pool.free == free)


def test_killed_owner_leaves_the_file_and_no_more(memfs: Memfs, private: Path, pool: Pool) -> None:
    free = pool.free
    assert memfs.run("fallocate", "-l", "6M", "private").returncode == 0
    script = f"""
import mmap, sys, trio
from pathlib import Path
sys.path.insert(0, {str(Path(__file__).parents[2])!r})
from memfs.contract.sys.libc import MAP_NORESERVE
from tests.e2e.owner import connected
async def main():
    async with connected({str(memfs.socket)!r}) as owner:
        _, fds = await owner.registered(Path({str(private)!r}))
        memory = mmap.mmap(fds[0], 0, mmap.MAP_SHARED | MAP_NORESERVE)
        memory[8 << 20] = 1  # which is not allocated, but by this
        print("registered", flush=True)
        await trio.sleep_forever()
trio.run(main)
"""
    process = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE)
    try:
        assert process.stdout is not None
        assert process.stdout.readline()
        assert (pool.free, private.stat().st_blocks) == (free - 4, 4 << 12)
        assert memfs.run("df", "--output=used", ".").stdout.split()[-1] == str(8 << 10)
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
        if process.stdout is not None:
            process.stdout.close()
    assert memfs.run("truncate", "-s", "0", "private").returncode == 0
    until(lambda: pool.free == free)
    assert memfs.run("df", "--output=used", ".").stdout.split()[-1] == "0"


async def test_a_page_of_a_gibibyte(mount_memfs: MountMemfs) -> None:
    if os.geteuid() != 0:
        pytest.skip("only root mounts a hugetlbfs")
    with huge_pages(1, SIZE_1G) as pool:
        memfs = mount_memfs("size=3g,pagesize=1G")
        free = pool.free
        private = await trio.to_thread.run_sync(make_private, memfs, 2 << 30)
        assert (await shell("fallocate", "-o", "2M", "-l", "2M", private, cwd=memfs.path)).returncode == 1
        assert (await shell("fallocate", "-o", "1G", "-l", "1G", private, cwd=memfs.path)).returncode == 0
        async with connected(memfs.socket) as owner:
            registered, fds = await owner.registered(private)
            assert registered.granule == SIZE_1G
            reply = await owner.ask(GetPfn(registered.file, pages(1 << 18, 2 << 18), alloc=False, lock=False))
            assert isinstance(reply, PfnReply)
            assert [(each.pages, each.order) for each in reply.runs] == [(pages(1 << 18, 2 << 18), 18)]
            assert pool.free == free - 1
            assert (await shell("fallocate", "-p", "-o", "1G", "-l", "1G", private, cwd=memfs.path)).returncode == 0
            assert pool.free == free
            close_all(fds)
        memfs.stop()


# -- beside a real hugetlbfs -------------------------------------------------------------------------------------------


@pytest.fixture
def hugetlbfs(pool: Pool, tmp_path: Path) -> Iterator[Path]:
    """A real hugetlbfs of 16 MiB."""
    path = tmp_path / "hugetlbfs"
    path.mkdir()
    result = run("mount", "-t", "hugetlbfs", "-o", "pagesize=2M,size=16m", "none", path)
    if result.returncode:
        pytest.skip(f"cannot mount a hugetlbfs to compare with: {result.stderr.strip()}")
    try:
        yield path
    finally:
        run("umount", "--lazy", path)


@pytest.mark.parametrize("seed", range(6))
def test_whole_pages_come_and_go_as_on_hugetlbfs(
    pool: Pool, hugetlbfs: Path, mount_memfs: MountMemfs, seed: int
) -> None:
    """At random; where they differ is in docs/DIFFERENCES.md."""
    lots = random.Random(seed)
    memfs = mount_memfs("size=16m,pagesize=2M,huge=never")
    ours, theirs = make_private(memfs, 0), hugetlbfs / "file"
    theirs.touch()
    both = [os.open(path, os.O_RDWR) for path in (ours, theirs)]
    try:
        for _ in range(60):
            start, length = lots.randrange(9) * SIZE_2M, lots.randrange(1, 9) * SIZE_2M
            what = lots.choice(["allocate", "allocate", "keep size", "punch", "truncate"])
            found = [change(fd, what, start, length) for fd in both]
            assert found[0] == found[1], (what, start, length)
    finally:
        for fd in both:
            os.close(fd)


def change(fd: int, what: str, start: int, length: int) -> tuple[object, ...]:
    """Change a file, and say what came of it."""
    modes = {"allocate": 0, "keep size": FALLOC_FL_KEEP_SIZE, "punch": PUNCH_HOLE}
    try:
        if what == "truncate":
            os.ftruncate(fd, start)
        else:
            fallocate(fd, modes[what], start, length)
        done = "done"
    except OSError as error:
        done = errno.errorcode[error.errno or 0]
        os.ftruncate(fd, 0)  # hugetlbfs keeps what it got until there was no more
    stat, space = os.fstat(fd), os.fstatvfs(fd)
    in_bytes = [blocks * space.f_bsize for blocks in (space.f_blocks, space.f_bfree, space.f_bavail)]
    return done, stat.st_size, stat.st_blocks, stat.st_blksize, *in_bytes


# -- on a tmpfs with huge= ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("huge", ["never", "always", "within_size", "advise"])
def test_blocks_are_as_large_as_a_tmpfs_says(mount_memfs: MountMemfs, tmp_path: Path, huge: str) -> None:
    mounted = run("mount", "-t", "tmpfs", "-o", f"size=64m,huge={huge}", "tmpfs", tmp_path)
    if mounted.returncode:
        pytest.skip(f"cannot mount a tmpfs to compare with: {mounted.stderr.strip()}")
    try:
        memfs = mount_memfs(f"size=64m,huge={huge}")
        found = []
        for directory in (memfs.path, tmp_path):
            (directory / "file").write_bytes(bytes(4 << 20))
            (directory / "link").symlink_to("x" * 200)
            (directory / "directory").mkdir()
            os.mkfifo(directory / "pipe")
            names = [directory, *(directory / name for name in ("file", "link", "directory", "pipe"))]
            found.append([path.lstat().st_blksize for path in names])
        assert found[0] == found[1]
        if state_of(memfs.path)["backing"] == "tmpfs":
            assert make_private(memfs, 4 << 20).stat().st_blksize == found[0][1]
    finally:
        run("umount", "--lazy", tmp_path)


def test_guest_memory_on_a_tmpfs_with_huge_pages_is_counted_exactly(mount_memfs: MountMemfs) -> None:
    memfs = mount_memfs("size=16m,huge=always")
    fd = os.open(make_private(memfs, 16 << 20), os.O_RDWR)
    used = 0
    for page in range(0, 2048, 7):
        fallocate(fd, FALLOC_FL_KEEP_SIZE, page * PAGE_SIZE, 3 * PAGE_SIZE)
        used += 3
        assert os.fstat(fd).st_blocks == used * 8
    fallocate(fd, FALLOC_FL_KEEP_SIZE, 8 << 20, 6 << 20)
    fallocate(fd, PUNCH_HOLE, (8 << 20) + PAGE_SIZE, PAGE_SIZE)
    used += (6 << 8) - 1
    space = os.statvfs(memfs.path)
    assert (os.fstat(fd).st_blocks // 8, space.f_blocks - space.f_bfree) == (used, used)
    free = space.f_bavail
    (memfs.path / "file").write_bytes(bytes(free * PAGE_SIZE))
    assert os.statvfs(memfs.path).f_bavail == 0
    with raises(errno.ENOSPC):
        fallocate(fd, FALLOC_FL_KEEP_SIZE, 0, 16 << 20)
    assert os.fstat(fd).st_blocks // 8 == used
    os.close(fd)


@pytest.mark.parametrize(("setting", "noted"), [("deny", True), ("never", False)])
def test_huge_pages_that_the_kernel_denies_are_noted(
    mount_memfs: MountMemfs, tmp_path: Path, setting: str, noted: bool
) -> None:
    """The setting is the machine's, so here it is only hidden from this memfs."""
    skip_without_mount_namespace()
    if not os.path.exists(SHMEM_ENABLED):
        pytest.skip("a kernel without huge pages of shared memory")
    (tmp_path / "setting").write_text(f"always within_size advise [{setting}] force\n")
    hide = f'mount --bind {tmp_path}/setting {SHMEM_ENABLED} && exec "$@"'
    memfs = mount_memfs(
        "size=16m,huge=always",
        within=(*mount_namespace(tmp_path, "--propagation", "slave"), "sh", "-c", hide, "sh"),
    )
    assert (memfs.notes == f"memfs: option huge=always has no effect: {SHMEM_ENABLED} says deny\n") == noted
    memfs.process.send_signal(signal.SIGTERM)
    memfs.see_end()
