"""No way in: what is in a private page of a guest-sealed file, nobody but its owner gets to see.

An owner writes a secret into private pages. Then each way of ways_in.py is tried, by root where the way leads through a
path and by another user where it leads through a process. Each is tried on an ordinary file as well, which shows
that it is a way at all on this machine. What root can do is tried, too, and is in THREATS.md.
"""

from __future__ import annotations

import errno
import mmap
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.helpers import raises

from .conftest import Memfs, memfs_command, run, start_memfs, stat_json
from .tools import as_user, skip_without
from .ways_in import BY_PATH, BY_PROCESS, SIZE

SECRET = b"THE SECRET OF THE GUEST"
CONTROL = b"NO SECRET OF THE GUEST"
NOBODY = as_user(65534)
OWNER = f"""
import mmap, os, sys, trio
from pathlib import Path
sys.path.insert(0, {str(Path(__file__).parents[2])!r})
from memfs.contract.protocol.messages import GetPfn
from memfs.contract.units import PageIndex, PageRange
from tests.e2e.owner import connected
async def main(socket, path):
    async with connected(socket) as owner:
        registered, fds = await owner.registered(Path(path))
        await owner.ask(GetPfn(registered.file, PageRange(PageIndex(0), PageIndex({SIZE // mmap.PAGESIZE})), True))
        memory = mmap.mmap(fds[0], {SIZE})
        memory[:] = {SECRET!r}.ljust({SIZE // 8}, b".") * 8
        print("written", flush=True)
        await trio.to_thread.run_sync(sys.stdin.read)
trio.run(main, *sys.argv[1:])
"""


@dataclass
class Place:
    """A memfs with a private file that holds the secret and an ordinary one that does, too."""

    memfs: Memfs
    private: Path
    ordinary: Path
    owner: subprocess.Popen[str]


@pytest.fixture(scope="module", params=["passthrough=auto", "passthrough=off", "backing=memfd"])
def place(can_mount: None, request: pytest.FixtureRequest) -> Iterator[Place]:
    """Where all users get to."""
    if os.geteuid() != 0:
        pytest.skip("acting as another user takes root")
    skip_without("setpriv")
    with tempfile.TemporaryDirectory(prefix="memfs-test-") as name:
        directory = Path(name)
        directory.chmod(0o755)
        memfs = start_memfs(directory, f"size=16m,allow_other,{request.param}")
        private, ordinary = memfs.path / "private", memfs.path / "ordinary"
        try:
            run(*memfs_command("create", "--seals", "guest", "--size", "1m", private))
            private.chmod(0o777)
            ordinary.write_bytes(CONTROL.ljust(SIZE // 8, b".") * 8)
            ordinary.chmod(0o777)
            owner = start_owner(memfs.socket, private)
            try:
                yield Place(memfs, private, ordinary, owner)
            finally:
                owner.communicate(timeout=20)
            memfs.stop()
        finally:
            memfs.kill()


def start_owner(socket: Path, path: Path) -> subprocess.Popen[str]:
    """A process that owns a file and has written the secret into its first pages."""
    command = [sys.executable, "-c", OWNER, str(socket), str(path)]
    owner = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert owner.stdout is not None
    assert owner.stdout.readline() == "written\n"
    return owner


def attempt(way: str, argument: object, *, nobody: bool = False) -> subprocess.CompletedProcess[bytes]:
    script = Path(__file__).with_name("ways_in.py").read_text()
    drop = NOBODY if nobody else []
    command = [*drop, sys.executable, "-I", "-c", script, way, str(argument)]
    return subprocess.run(command, capture_output=True, check=False, timeout=60, cwd="/")


@pytest.mark.parametrize("way", BY_PATH)
def test_no_way_by_path(place: Place, way: str) -> None:
    control = attempt(way, place.ordinary)
    got = attempt(way, place.private)
    assert SECRET not in got.stdout
    assert SECRET not in got.stderr
    assert not got.stdout.strip(b"\0"), "something, if not the secret"
    if CONTROL not in control.stdout:
        pytest.skip(f"no way on this machine either: {control.stderr.decode().strip()[-100:]}")


@pytest.mark.parametrize("way", BY_PROCESS)
@pytest.mark.parametrize("whose", ["daemon", "owner"])
def test_no_way_by_process_for_another_user(place: Place, way: str, whose: str) -> None:
    pid = place.memfs.process.pid if whose == "daemon" else place.owner.pid
    got = attempt(way, pid, nobody=True)
    assert SECRET not in got.stdout + got.stderr
    assert not got.stdout


@pytest.mark.parametrize("way", ["their_memory", "their_mapped_files", "their_memory_by_system_call", "ptrace"])
def test_not_in_the_memory_of_the_daemon_even_for_root(place: Place, way: str) -> None:
    """It never maps what the guest has, so that neither a core dump nor a debugger finds anything."""
    got = attempt(way, place.memfs.process.pid)
    assert SECRET not in got.stdout
    if way == "their_memory":
        assert int(got.stderr.split(b" bytes looked at")[0].split()[-1]) > 1 << 20
        assert SECRET in attempt(way, place.owner.pid).stdout, "root finds it where it is mapped"


def test_root_finds_the_backing_through_the_daemon(place: Place) -> None:
    """This is what root can do: THREATS.md says so."""
    assert SECRET in attempt("their_descriptors", place.memfs.process.pid).stdout


def test_daemon_leaves_no_core(place: Place) -> None:
    limits = Path(f"/proc/{place.memfs.process.pid}/limits").read_text()
    line = next(line for line in limits.splitlines() if line.startswith("Max core file size"))
    assert line.split()[4:6] == ["0", "0"]


def test_private_pages_are_not_swapped(place: Place) -> None:
    release = tuple(map(int, os.uname().release.split(".")[:2]))
    state = stat_json(place.memfs.path)
    pinned = state["backing"] == "tmpfs" and release >= (6, 4)
    assert state["guest_swappable"] is not pinned
    assert ("private memory can be swapped" in place.memfs.notes) is not pinned


# -- opened or mapped before the seal ----------------------------------------------------------------------------------


def test_descriptor_from_before_the_seal(place: Place) -> None:
    path = place.memfs.path / "before"
    path.touch()
    control, named = os.open(path, os.O_ACCMODE), os.open(path, os.O_PATH)
    reopened = -1
    os.setxattr(path, "user.memfs.seals", b"guest")
    os.truncate(path, 1 << 20)
    owner = start_owner(place.memfs.socket, path)
    try:
        reopened = os.open(f"/proc/self/fd/{named}", os.O_RDONLY)
        buffer = mmap.mmap(-1, SIZE)
        for attempted in (
            lambda: os.readv(control, [buffer]),
            lambda: os.pread(control, SIZE, 0),
            lambda: mmap.mmap(control, SIZE, mmap.MAP_SHARED, mmap.PROT_READ),
            lambda: os.pread(named, SIZE, 0),
            lambda: os.read(reopened, SIZE),
        ):
            with raises(errno.EPERM, errno.ENODEV, errno.EBADF, errno.EACCES):
                attempted()
        assert SECRET not in buffer[:]
    finally:
        owner.communicate(timeout=20)
        for fd in {control, named, reopened} - {-1}:
            os.close(fd)
        path.unlink()


@pytest.mark.parametrize("flags", [mmap.MAP_SHARED, mmap.MAP_PRIVATE])
def test_mapping_from_before_the_seal_keeps_the_file_unsealed(place: Place, flags: int) -> None:
    path = place.memfs.path / "mapped"
    path.write_bytes(bytes(SIZE))
    with path.open("r+b") as file:
        mapping = mmap.mmap(file.fileno(), SIZE, flags)
        file.truncate(0)
    with raises(errno.EBUSY):
        os.setxattr(path, "user.memfs.seals", b"guest")
    assert run(*memfs_command("seals", path)).stdout == "\n"
    mapping.close()
    path.unlink()


def test_memory_of_a_file_that_is_gone_is_not_found_in_a_new_one(place: Place) -> None:
    path = place.memfs.path / "reused"
    for _ in range(3):
        run(*memfs_command("create", "--seals", "guest", "--size", str(SIZE), path))
        start_owner(place.memfs.socket, path).communicate(timeout=20)
        path.unlink()
        assert run("fallocate", "-l", str(SIZE), path).returncode == 0
        assert path.read_bytes() == bytes(SIZE)
        path.unlink()
