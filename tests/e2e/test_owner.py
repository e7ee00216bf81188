"""Owners of files on a real mount: who may register what, and that nothing is freed before its owner has let go."""

from __future__ import annotations

import errno
import mmap
import os
import signal
import socket
import subprocess
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
import trio

from memfs.contract.page_map import PageMapView
from memfs.contract.protocol.messages import (
    Done,
    Failed,
    Fallocate,
    GetPfn,
    InvalidateBegin,
    InvalidateEnd,
    PfnReply,
    PutPfn,
    Registered,
    Unregister,
)
from memfs.contract.protocol.peer import close_all
from memfs.contract.units import PAGE_SIZE, PageIndex
from tests.helpers import pages

from .conftest import Memfs, MountMemfs, memfs_command, state_of
from .owner import connected, shell
from .tools import skip_without, tools_in

SIZE = 4 << 20


@pytest.fixture
def guest_file(memfs: Memfs) -> Path:
    """A guest-sealed file of 4 MiB, nothing of it allocated."""
    path = memfs.path / "private"
    subprocess.run(memfs_command("create", "--seals", "guest", "--size", str(SIZE), path), check=True)
    return path


async def test_punch_returns_only_after_the_owner_has_acknowledged(memfs: Memfs, guest_file: Path) -> None:
    async with connected(memfs.socket) as owner:
        registered, fds = await owner.registered(guest_file)
        page_map = PageMapView(fds[1])
        assert (await shell("fallocate", "-l", "1M", "private", cwd=memfs.path)).returncode == 0
        assert owner.heard == [Fallocate(registered.file, pages(0, 256))]
        owner.heard.clear()
        owner.acknowledge = trio.Event()
        owner.arrived = trio.Event()
        finished = trio.Event()

        async def punch() -> None:
            assert (await shell("fallocate", "-p", "-o", "64K", "-l", "64K", "private", cwd=memfs.path)).returncode == 0
            finished.set()

        async with trio.open_nursery() as nursery:
            nursery.start_soon(punch)
            await owner.arrived.wait()
            await trio.sleep(0.5)  # long enough for a punch that does not wait to be over
            assert owner.heard == [InvalidateBegin(registered.file, pages(16, 32))]
            assert not finished.is_set()
            assert page_map.is_allocated(PageIndex(20)), "freed before the owner has let go"
            owner.acknowledge.set()
        assert owner.heard[1:] == [InvalidateEnd(registered.file, pages(16, 32))]
        assert not page_map.is_allocated(PageIndex(20))
        page_map.close()
        close_all(fds)


async def test_punch_waits_for_locked_pages(memfs: Memfs, guest_file: Path) -> None:
    async with connected(memfs.socket) as owner:
        registered, fds = await owner.registered(guest_file)
        await shell("fallocate", "-l", "1M", "private", cwd=memfs.path)
        reply = await owner.ask(GetPfn(registered.file, pages(16, 18), False))
        assert isinstance(reply, PfnReply)
        finished = trio.Event()

        async def punch() -> None:
            await shell("fallocate", "-p", "-o", "64K", "-l", "64K", "private", cwd=memfs.path)
            finished.set()

        async with trio.open_nursery() as nursery:
            owner.arrived = trio.Event()
            nursery.start_soon(punch)
            await owner.arrived.wait()
            await owner.ask(PutPfn(registered.file, pages(16, 17), True))
            await trio.sleep(0.5)
            assert not finished.is_set(), "one page is still locked"
            assert await owner.ask(PutPfn(registered.file, pages(17, 18), True)) == Done()
        assert finished.is_set()
        close_all(fds)


async def test_page_map_says_what_the_shell_did(memfs: Memfs, guest_file: Path) -> None:
    async with connected(memfs.socket) as owner:
        _, fds = await owner.registered(guest_file)
        page_map = PageMapView(fds[1])
        for command in (["-o", "1M", "-l", "1M"], ["-p", "-o", "1028K", "-l", "8K"]):
            assert (await shell("fallocate", *command, "private", cwd=memfs.path)).returncode == 0
        assert list(page_map.runs(pages(0, SIZE // PAGE_SIZE))) == [pages(256, 257), pages(259, 512)]
        page_map.close()
        close_all(fds)


async def test_frames_are_contiguous_and_absent_pages_are_said_to_be(memfs: Memfs, guest_file: Path) -> None:
    async with connected(memfs.socket) as owner:
        registered, fds = await owner.registered(guest_file)
        await shell("fallocate", "-o", "8K", "-l", "8K", "private", cwd=memfs.path)
        reply = await owner.ask(GetPfn(registered.file, pages(0, 6), False))
        assert isinstance(reply, PfnReply)
        assert [(run.pages, run.pfn is not None) for run in reply.runs] == [
            (pages(0, 2), False),
            (pages(2, 4), True),
            (pages(4, 6), False),
        ]
        refused = await owner.ask(GetPfn(registered.file, pages(1023, 1025), False))
        assert isinstance(refused, Failed)
        assert refused.errno == errno.EINVAL
        not_locked = await owner.ask(PutPfn(registered.file, pages(0, 2), False))
        assert isinstance(not_locked, Failed)
        assert not_locked.errno == errno.EINVAL
        assert await owner.ask(PutPfn(registered.file, pages(2, 4), False)) == Done()
        close_all(fds)


async def test_allocation_for_an_owner_is_all_or_nothing(memfs: Memfs) -> None:
    await shell("truncate", "-s", "100M", "shared", cwd=memfs.path)
    async with connected(memfs.socket) as owner:
        registered, fds = await owner.registered(memfs.path / "shared")
        full = await owner.ask(GetPfn(registered.file, pages(0, 100 << 8), True))
        assert isinstance(full, Failed)
        assert full.errno == errno.ENOSPC
        assert (await shell("stat", "-c", "%b", "shared", cwd=memfs.path)).stdout == b"0\n"
        got = await owner.ask(GetPfn(registered.file, pages(0, 16), True))
        assert isinstance(got, PfnReply)
        assert (await shell("stat", "-c", "%b", "shared", cwd=memfs.path)).stdout == b"128\n"
        close_all(fds)


async def test_host_and_owner_see_the_same_shared_bytes(memfs: Memfs) -> None:
    await shell("bash", "-c", "echo from the host > shared", cwd=memfs.path)
    async with connected(memfs.socket) as owner:
        _, fds = await owner.registered(memfs.path / "shared")
        with mmap.mmap(fds[0], 14) as memory:
            assert memory[:] == b"from the host\n"
            memory[:] = b"from the guest"
        assert (await shell("cat", "shared", cwd=memfs.path)).stdout == b"from the guest"
        close_all(fds)


@pytest.mark.parametrize(
    ("prepare", "flags", "number"),
    [
        ("true", os.O_RDONLY, errno.EACCES),
        ("true", os.O_WRONLY, errno.EACCES),
        ("chattr +a", os.O_RDWR | os.O_APPEND, errno.EPERM),
        ("true", os.O_PATH, errno.EBADF),
        ("true", os.O_RDONLY | os.O_DIRECTORY, errno.EINVAL),
    ],
)
async def test_descriptor_that_will_not_do(memfs: Memfs, prepare: str, flags: int, number: int) -> None:
    skip_without(*tools_in(prepare))
    await shell("touch", "file", cwd=memfs.path)
    assert (await shell(*prepare.split(), "file", cwd=memfs.path)).returncode == 0
    path = memfs.path if flags & os.O_DIRECTORY else memfs.path / "file"
    async with connected(memfs.socket) as owner:
        reply = await owner.register(path, flags)
        assert isinstance(reply, Failed)
        assert reply.errno == number
        state = await trio.to_thread.run_sync(state_of, memfs.path)
        assert (state["registered_files"], state["open_handles"]) == (0, 0)


async def test_descriptor_of_something_else(memfs: Memfs, mount_memfs: MountMemfs, tmp_path: Path) -> None:
    other = mount_memfs()
    await shell("touch", "file", cwd=other.path)
    (tmp_path / "file").touch()
    async with connected(memfs.socket) as owner:
        for path in (other.path / "file", tmp_path / "file", Path("/dev/null")):
            reply = await owner.register(path)
            assert isinstance(reply, Failed)
            assert reply.errno == errno.EINVAL


async def test_owner_that_lets_go_in_the_middle_of_a_punch_hears_of_its_end(memfs: Memfs, guest_file: Path) -> None:
    """Or it would wait for that for ever: kvmsim's next change of slots does."""
    async with connected(memfs.socket) as owner:
        registered, fds = await owner.registered(guest_file)
        close_all(fds)
        owner.acknowledge, owner.arrived = trio.Event(), trio.Event()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(lambda: shell("fallocate", "-p", "-l", "64K", guest_file, cwd=memfs.path))
            with trio.fail_after(5):
                await owner.arrived.wait()
                assert isinstance(await owner.ask(Unregister(registered.file)), Done)
                owner.acknowledge.set()
        with trio.fail_after(5):
            while len(owner.heard) < 2:  # noqa: ASYNC110
                await trio.sleep(0.001)
        assert [type(message) for message in owner.heard] == [InvalidateBegin, InvalidateEnd]
        assert isinstance(await owner.register(guest_file), Registered)


async def test_second_owner_is_refused_until_the_first_is_gone(memfs: Memfs, guest_file: Path) -> None:
    async with connected(memfs.socket) as first, connected(memfs.socket) as second:
        one = await first.register(guest_file)
        assert isinstance(one, Registered)
        assert await first.register(guest_file) == one  # again is fine, and counted
        refused = await second.register(guest_file)
        assert isinstance(refused, Failed)
        assert refused.errno == errno.EPERM
        assert await first.ask(Unregister(one.file)) == Done()
        assert isinstance(await second.register(guest_file), Failed)
        assert await first.ask(Unregister(one.file)) == Done()
        assert isinstance(await second.register(guest_file), Registered)


async def test_file_of_a_killed_owner_can_be_registered_at_once(memfs: Memfs, guest_file: Path) -> None:
    script = f"""
import sys, trio
from pathlib import Path
sys.path.insert(0, {str(Path(__file__).parents[2])!r})
from tests.e2e.owner import connected
async def main():
    async with connected({str(memfs.socket)!r}) as owner:
        owner.acknowledge = trio.Event()  # never
        await owner.registered(Path({str(guest_file)!r}))
        print("registered", flush=True)
        await trio.sleep_forever()
trio.run(main)
"""
    process = await trio.lowlevel.open_process([sys.executable, "-c", script], stdout=subprocess.PIPE)
    stdout = process.stdout
    assert stdout is not None
    try:
        assert (await stdout.receive_some()).startswith(b"registered")
        async with trio.open_nursery() as nursery:
            # It never acknowledges, so this waits until it is dead.
            nursery.start_soon(lambda: shell("fallocate", "-l", "4K", guest_file, cwd=memfs.path))
            await trio.sleep(0.3)
            process.send_signal(signal.SIGKILL)
    finally:
        process.kill()
        await process.wait()
        await stdout.aclose()
    async with connected(memfs.socket) as owner:
        assert isinstance(await owner.register(guest_file), Registered)


@asynccontextmanager
async def in_its_own_punch(memfs: Memfs, guest_file: Path) -> AsyncIterator[trio.Process]:
    """An owner of which a thread waits for an answer that only the owner could bring about."""
    script = f"""
import os, sys, threading, trio
from pathlib import Path
sys.path.insert(0, {str(Path(__file__).parents[2])!r})
from memfs.contract.sys.libc import fallocate
from tests.e2e.owner import connected
async def main():
    async with connected({str(memfs.socket)!r}) as owner:
        await owner.registered(Path({str(guest_file)!r}))
        fd = await trio.to_thread.run_sync(os.open, {str(guest_file)!r}, os.O_RDWR)
        await trio.to_thread.run_sync(fallocate, fd, 0, 0, 8192)
        owner.acknowledge = trio.Event()  # never
        owner.arrived = trio.Event()
        threading.Thread(target=fallocate, args=(fd, 3, 0, 4096)).start()
        await owner.arrived.wait()
        print("asked", flush=True)
        await trio.sleep_forever()
trio.run(main)
"""
    process = await trio.lowlevel.open_process([sys.executable, "-c", script], stdout=subprocess.PIPE)
    stdout = process.stdout
    assert stdout is not None
    try:
        assert (await stdout.receive_some()).startswith(b"asked")
        yield process
    finally:
        process.kill()
        await process.wait()
        await stdout.aclose()


async def test_owner_killed_inside_its_own_punch_is_gone_at_once(memfs: Memfs, guest_file: Path) -> None:
    """Its sockets stay open."""
    async with in_its_own_punch(memfs, guest_file) as process:
        process.send_signal(signal.SIGKILL)
        async with connected(memfs.socket) as owner:
            with trio.fail_after(3):  # less than the timeout that would end it otherwise
                while not isinstance(await owner.register(guest_file), Registered):  # noqa: ASYNC110
                    await trio.sleep(0.01)


@pytest.mark.parametrize(
    ("number", "said"), [(signal.SIGSTOP, ": its process is stopped"), (0, "; the file call that")]
)
async def test_reason_of_a_fence_says_what_is_known(memfs: Memfs, guest_file: Path, number: int, said: str) -> None:
    """That a thread of the owner's waits in the call says nothing of why a stopped owner does not answer."""
    memfs.expected.append("is fenced: no answer within 5 s")
    async with in_its_own_punch(memfs, guest_file) as process:
        process.send_signal(number)
        with trio.fail_after(20):
            while "is fenced" not in memfs.log.read_text():  # noqa: ASYNC110
                await trio.sleep(0.01)
        assert f"no answer within 5 s{said}" in memfs.log.read_text()


async def test_unlinked_file_lives_until_its_owner_lets_go(memfs: Memfs) -> None:
    await shell("fallocate", "-l", "8M", "file", cwd=memfs.path)
    async with connected(memfs.socket) as owner:
        registered, fds = await owner.registered(memfs.path / "file")
        await shell("rm", "file", cwd=memfs.path)
        assert (await shell("df", "--output=used", ".", cwd=memfs.path)).stdout.split()[-1] == b"8192"
        assert isinstance(await owner.ask(GetPfn(registered.file, pages(0, 1), True)), PfnReply)
        close_all(fds)  # a descriptor of the backing file would keep its memory
        assert await owner.ask(Unregister(registered.file)) == Done()
        assert (await shell("df", "--output=used", ".", cwd=memfs.path)).stdout.split()[-1] == b"0"


@pytest.mark.parametrize("garbage", [b"", b"x", b"\0" * 16, b"\xff" * 5000, b"\1\0\3\0\x10\0\0\0\1\0\0\0\0\0\0\0"])
async def test_broken_peer_is_cut_off_and_others_are_not(memfs: Memfs, guest_file: Path, garbage: bytes) -> None:
    memfs.expected.append("broke the protocol and is cut off")
    async with connected(memfs.socket) as owner:
        await owner.register(guest_file)
        broken = trio.socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with broken:
            await broken.connect(str(memfs.socket))
            await broken.send(garbage)
            if garbage:
                assert await broken.recv(100) == b""
        assert (await shell("fallocate", "-l", "4K", guest_file, cwd=memfs.path)).returncode == 0
        assert len(owner.heard) == 1


async def test_owner_that_never_answers_is_fenced(mount_memfs: MountMemfs) -> None:
    memfs = mount_memfs("size=64m,notify_timeout=1")
    memfs.expected.append("is fenced: no answer within 1 s")
    await shell("fallocate", "-l", "1M", "file", cwd=memfs.path)
    async with connected(memfs.socket) as owner:
        owner.acknowledge = trio.Event()
        await owner.register(memfs.path / "file")
        assert (await shell("fallocate", "-p", "-l", "64K", "file", cwd=memfs.path)).returncode == 0
        await owner.gone.wait()
        assert [type(message).__name__ for message in owner.heard] == ["InvalidateBegin", "Fenced"]
    async with connected(memfs.socket) as owner:
        assert isinstance(await owner.register(memfs.path / "file"), Registered)


async def test_size_that_an_owner_sets_is_seen(memfs: Memfs) -> None:
    path = memfs.path / "shared"
    assert (await shell("sh", "-c", ": > shared; stat -c %s shared", cwd=memfs.path)).stdout == b"0\n"
    async with connected(memfs.socket) as owner:
        _, fds = await owner.registered(path)
        assert (await shell("stat", "-c", "%s", "shared", cwd=memfs.path)).stdout == b"0\n"
        os.ftruncate(fds[0], 8192)
        assert (await shell("stat", "-c", "%s", "shared", cwd=memfs.path)).stdout == b"8192\n"
        close_all(fds)
