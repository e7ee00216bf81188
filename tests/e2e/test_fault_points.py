"""Every point of fault injection, with every kind of fault: what is given, taken, counted and told stays right.

In the daemon, a file with an owner is punched, allocated and truncated, and at each point on the way it fails, waits or
dies. Then the account must be right whatever came of the system call: the filesystem's used pages, the file's blocks
and its page map are the same, the owner has either been told all or been cut off, and everything works from then on.
The same for kvmsim at its points, where memfs must be as well off as before.
"""

from __future__ import annotations

import errno
import fcntl
import itertools
import json
import os
import signal
import subprocess
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import pytest
import trio

from memfs.contract.faults import Kind, Point
from memfs.contract.page_map import PageMapView
from memfs.contract.protocol.client import StoreGone
from memfs.contract.protocol.messages import (
    Failed,
    Fallocate,
    GetPfn,
    InvalidateBegin,
    InvalidateEnd,
    Measured,
    Message,
    PfnReply,
    Populate,
    Registered,
)
from memfs.contract.protocol.peer import close_all
from memfs.contract.units import ByteOffset, PageIndex, PageRange

from .conftest import Memfs, MountMemfs, memfs_command, run
from .injection import Injection
from .owner import Owner, connected, shell

PAGE = 4096
PAGES = 16  # that the file has at first, of twice as many
MESSAGES = {Point.BEFORE_SEND, Point.AFTER_SEND, Point.BEFORE_RECEIVE, Point.AFTER_RECEIVE}
TAKING = {
    *(Point.BEFORE_BEGIN, Point.AFTER_BEGIN, Point.BEFORE_FREE, Point.AFTER_FREE),
    *(Point.BEFORE_ACCOUNT, Point.AFTER_ACCOUNT, Point.BEFORE_END, Point.AFTER_END),
}
GIVING = {
    *(Point.BEFORE_ALLOCATE, Point.AFTER_ALLOCATE, Point.BEFORE_ACCOUNT, Point.AFTER_ACCOUNT),
    *(Point.BEFORE_TELL, Point.AFTER_TELL),
}


@dataclass(frozen=True)
class Change:
    """A command, and what it comes to."""

    command: tuple[str, ...]
    points: set[Point]  #: that it passes
    pages: int  #: the file has when it is done
    heard: tuple[type, ...]  #: by the owner


CHANGES = {
    "punch": Change(("fallocate", "-p", "-l", "16K"), TAKING | MESSAGES, PAGES - 4, (InvalidateBegin, InvalidateEnd)),
    "truncate": Change(("truncate", "-s", "32K"), TAKING | MESSAGES, 8, (InvalidateBegin, InvalidateEnd)),
    "fallocate": Change(("fallocate", "-o", "96K", "-l", "16K"), GIVING | MESSAGES, PAGES + 4, (Fallocate,)),
}
#: Where a failure is the system call's; anywhere else it is the owner's, of whom it must not depend
FAILS = {
    *(Point.BEFORE_FREE, Point.AFTER_FREE, Point.BEFORE_ALLOCATE, Point.AFTER_ALLOCATE),
    *(Point.BEFORE_ACCOUNT, Point.AFTER_ACCOUNT),
}
UNDONE = {Point.BEFORE_FREE, Point.BEFORE_ALLOCATE}
#: Where the owner is cut off. After an end, or what is posted like one, it has been told all there is.
CUTS_OFF = {
    *(Point.BEFORE_BEGIN, Point.AFTER_BEGIN, Point.BEFORE_END, Point.AFTER_END, Point.BEFORE_TELL, Point.AFTER_TELL),
    *MESSAGES,
}
CASES = [(name, point) for name, change in CHANGES.items() for point in Point if point in change.points]


async def used(memfs: Memfs) -> int:
    """Pages that the filesystem says are in use."""
    stat = await trio.to_thread.run_sync(os.statvfs, memfs.path)
    return stat.f_blocks - stat.f_bfree


async def blocks(path: Path) -> int:
    """Pages that a file says it has."""
    return (await trio.to_thread.run_sync(os.stat, path)).st_blocks * 512 // PAGE


async def prepare(memfs: Memfs, *, guest: bool) -> Path:
    """A file with its first pages."""
    path = memfs.path / "file"

    def make() -> None:
        os.mknod(path)
        if guest:
            os.setxattr(path, "user.memfs.seals", b"guest")
        os.truncate(path, 2 * PAGES * PAGE)
        fd = os.open(path, os.O_RDWR)
        os.posix_fallocate(fd, 0, PAGES * PAGE)
        os.close(fd)

    await trio.to_thread.run_sync(make)
    return path


@asynccontextmanager
async def owning(memfs: Memfs, path: Path) -> AsyncIterator[tuple[Owner, PageMapView | None]]:
    async with connected(memfs.socket) as owner:
        with trio.fail_after(5):
            _, fds = await owner.registered(path)
        view = PageMapView(os.dup(fds[1])) if len(fds) > 1 else None
        close_all(fds)
        try:
            yield owner, view
        finally:
            if view is not None:
                view.close()


async def look(memfs: Memfs, path: Path, view: PageMapView | None) -> int:
    """All accounts agree; how many pages they say."""
    pages = await blocks(path)
    assert await used(memfs) == pages
    if view is not None:
        assert view.count(PageRange(PageIndex(0), PageIndex(1024))) == pages
    return pages


@pytest.mark.parametrize("mount", ["", "backing=memfd"])
@pytest.mark.parametrize("guest", [True, False], ids=["guest", "ordinary"])
async def test_every_point_of_memfs(mount_memfs: MountMemfs, in_memfs: Injection, mount: str, guest: bool) -> None:
    """Failing and waiting; one after the other on one mount, whose invariants are verified at its end."""
    memfs = mount_memfs(f"size=64m,{mount}".rstrip(","))
    memfs.expected += ["could not be notified", "cannot be received from"]
    for (name, point), kind in itertools.product(CASES, (Kind.FAIL, Kind.DELAY)):
        change, what = CHANGES[name], f"{name}, {kind.value} {point.value}"
        path = await prepare(memfs, guest=guest)
        async with owning(memfs, path) as (owner, view):
            await blocks(path)  # memfs is done with what came before
            in_memfs.arm(point, kind)
            with trio.fail_after(4):
                done = await shell(*change.command, path, cwd=Path("/"))
                while in_memfs.armed:  # a socket is listened to again when all has been done
                    assert point in MESSAGES, f"{what}: nobody came by"
                    await trio.sleep(0.001)
            fails = kind is Kind.FAIL and point in FAILS
            assert (done.returncode != 0) == fails, (what, done)
            assert not fails or b"Input/output error" in done.stderr, (what, done)
            pages = await look(memfs, path, view)
            assert pages == (PAGES if kind is Kind.FAIL and point in UNDONE else change.pages), what
            with trio.fail_after(5):
                if kind is Kind.FAIL and point in CUTS_OFF:
                    await owner.gone.wait()
                else:
                    expected = () if fails and point is Point.BEFORE_ALLOCATE else change.heard
                    while tuple(map(type, owner.heard)) != expected:  # noqa: ASYNC110
                        await trio.sleep(0.001)
                    assert not owner.gone.is_set(), what
                    assert isinstance(await owner.register(path), Registered), what
        async with owning(memfs, path) as (owner, view):  # it goes on as if nothing had happened
            again = await shell("fallocate", "-p", "-l", "128K", path, cwd=Path("/"))
            assert again.returncode == 0, (what, again)
            assert await look(memfs, path, view) == 0, what
            assert InvalidateBegin in map(type, owner.heard), what
        await trio.to_thread.run_sync(path.unlink)
        with trio.fail_after(5):
            while await used(memfs):  # noqa: ASYNC110
                await trio.sleep(0.001)


ASKED = [
    Point.BEFORE_ALLOCATE,
    Point.AFTER_ALLOCATE,
    Point.BEFORE_ACCOUNT,
    Point.AFTER_ACCOUNT,
    *sorted(MESSAGES, key=str),
]


@pytest.mark.parametrize("mount", ["", "backing=memfd"])
@pytest.mark.parametrize("ask", ["get_pfn", "populate", "get_pfn of shared memory"])
async def test_every_point_of_what_an_owner_asks_for(
    mount_memfs: MountMemfs, in_memfs: Injection, mount: str, ask: str
) -> None:
    """Pages that an owner has allocated for it: what it is answered is what is accounted for."""
    memfs = mount_memfs(f"size=64m,{mount}".rstrip(","))
    memfs.expected += ["cannot be received from"]
    wanted = PageRange(PageIndex(PAGES), PageIndex(PAGES + 4))
    for point, kind in itertools.product(ASKED, (Kind.FAIL, Kind.DELAY)):
        what = f"{ask}, {kind.value} {point.value}"
        path = await prepare(memfs, guest="shared" not in ask)
        async with owning(memfs, path) as (owner, view):
            registered = await owner.register(path)
            assert isinstance(registered, Registered)
            fds = list(await trio.to_thread.run_sync(content_for, path)) if ask == "populate" else []
            message = (
                Populate(wanted, ByteOffset(0)) if ask == "populate" else GetPfn(registered.file, wanted, True, False)
            )
            await blocks(path)  # memfs is done with what came before
            in_memfs.arm(point, kind)
            answer: Message | None = None
            with trio.fail_after(5), suppress(StoreGone):
                answer = await owner.ask(message, fds)
            for fd in fds:
                await trio.to_thread.run_sync(os.close, fd)
            await blocks(path)  # nor only with answering
            assert not in_memfs.armed, f"{what}: nobody came by"
            cut_off = kind is Kind.FAIL and point in MESSAGES
            fails = kind is Kind.FAIL and point in FAILS
            if not (cut_off and point is Point.AFTER_SEND):
                assert isinstance(answer, Failed if fails else (Measured, PfnReply)) != cut_off, (what, answer)
            assert not isinstance(answer, Failed) or answer.errno == errno.EIO, (what, answer)
            pages = await look(memfs, path, view)
            not_begun = kind is Kind.FAIL and point in {
                Point.BEFORE_ALLOCATE,
                Point.BEFORE_RECEIVE,
                Point.AFTER_RECEIVE,
            }
            assert pages == (PAGES if not_begun else PAGES + 4), what
            with trio.fail_after(5):
                if cut_off:
                    await owner.gone.wait()
                else:
                    assert isinstance(await owner.register(path), Registered), what
        async with owning(memfs, path) as (owner, view):  # it goes on as if nothing had happened
            again = await shell("fallocate", "-p", "-l", "128K", path, cwd=Path("/"))
            assert again.returncode == 0, (what, again)
            assert await look(memfs, path, view) == 0, what
        await trio.to_thread.run_sync(path.unlink)
        with trio.fail_after(5):
            while await used(memfs):  # noqa: ASYNC110
                await trio.sleep(0.001)


def content_for(path: Path) -> tuple[int, int]:
    """What Populate needs: descriptors of the file, and of as much as is wanted for it."""
    source = os.memfd_create("content", os.MFD_ALLOW_SEALING)
    os.ftruncate(source, 4 * PAGE)
    fcntl.fcntl(source, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK)
    return os.open(path, os.O_RDWR), source


async def test_memfs_dies_at_every_point(mount_memfs: MountMemfs, in_memfs: Injection) -> None:
    """The system call fails, the owner is told, and memfs is mounted again over what is left, empty."""
    memfs = mount_memfs("size=64m")
    mount = [*memfs_command("mount", memfs.path, "--socket", memfs.socket), "-o", "size=64m"]
    try:
        for name, point in CASES:
            what = f"{name}, dying {point.value}"
            path = await prepare(memfs, guest=True)
            async with owning(memfs, path) as (owner, _):
                await blocks(path)  # memfs is done with what came before
                in_memfs.arm(point, Kind.KILL)
                with trio.fail_after(10):
                    done = await shell(*CHANGES[name].command, path, cwd=Path("/"))
                    await owner.gone.wait()
                assert done.returncode, (what, done)
                assert not in_memfs.armed, what
            again = await shell(*mount, cwd=Path("/"))
            assert again.returncode == 0, (what, again)
            assert (await shell("ls", "-A", memfs.path, cwd=Path("/"))).stdout == b"", what
            assert await used(memfs) == 0, what
        assert await trio.to_thread.run_sync(memfs.process.wait, 5) == -signal.SIGKILL
    finally:
        await trio.to_thread.run_sync(run, "umount", memfs.path)


# -- kvmsim ------------------------------------------------------------------------------------------------------------

TOLD = {
    "punch": {Point.BEFORE_BEGIN, Point.AFTER_BEGIN, Point.BEFORE_END, Point.AFTER_END, *MESSAGES},
    "fallocate": {Point.BEFORE_TELL, Point.AFTER_TELL},
}
KVMSIM_CASES = [(name, point) for name, points in TOLD.items() for point in Point if point in points]


class Vm:
    """A virtual machine in a process of its own (soak_vm.py)."""

    def __init__(self, memfs: Memfs, private: Path, injection: Injection) -> None:
        (memfs.path / "shared").touch()
        arguments = [memfs.socket, memfs.path / "shared", private, str(2 * PAGES * PAGE)]
        self.process = subprocess.Popen(
            [sys.executable, "-m", "tests.e2e.soak_vm", *map(str, arguments)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, **injection.environment},
            cwd=Path(__file__).parents[2],
        )
        assert self.hears() == {"answer": "ready"}

    def hears(self) -> object:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        return json.loads(line) if line else None

    def says(self, command: dict[str, object]) -> object:
        assert self.process.stdin is not None
        print(json.dumps(command), file=self.process.stdin, flush=True)
        return self.hears()

    def end(self) -> int:
        self.process.communicate(timeout=10)
        return self.process.returncode


@pytest.mark.parametrize("kind", Kind, ids=lambda kind: kind.value)
def test_every_point_of_kvmsim(memfs: Memfs, injection: Injection, kind: Kind) -> None:
    """Whatever becomes of it, the system call succeeds soon, and the next VM can have the file."""
    path = memfs.path / "private"
    os.mknod(path)
    os.setxattr(path, "user.memfs.seals", b"guest")
    vm: Vm | None = None
    try:
        for name, point in KVMSIM_CASES:
            what = f"{name}, {kind.value} {point.value}"
            os.truncate(path, 0)
            os.truncate(path, 2 * PAGES * PAGE)
            memfs.run("fallocate", "-l", str(PAGES * PAGE), path)
            vm = vm or Vm(memfs, path, injection)
            assert vm.says({"do": "store", "side": "private", "pages": [1, 2], "value": 7}) == {"answer": []}, what
            injection.arm(point, kind)
            change = CHANGES[name]
            assert memfs.run(*change.command, path, timeout=3).returncode == 0, what
            if kind is not Kind.DELAY:
                said = vm.hears()
                assert kind is Kind.KILL or "memfs" in str(said["gone"]), (what, said)  # type: ignore[index]
                assert vm.end() == (-signal.SIGKILL if kind is Kind.KILL else 1), what
                vm = None
            else:
                assert "blocks" in str(vm.says({"do": "check"})), what
                value = 0 if name == "punch" else 7
                values = vm.says({"do": "load", "side": "private", "pages": [1]})
                assert values == {"answer": [value]}, what
            assert not injection.armed, what
            private = os.stat(path).st_blocks * 512 // PAGE
            assert private == change.pages + (kind is Kind.DELAY and name == "punch"), what
        if vm is not None:
            assert vm.end() == 0
            vm = None
    finally:
        if vm is not None:
            vm.process.kill()
            vm.process.communicate()
