"""A filesystem that never answers keeps no daemon alive: one that is told to end, or killed, is gone, and its mount."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from memfs.contract.sys.libc import MNT_DETACH, umount
from tests.helpers import raises, until

from .conftest import Memfs, memfs_command, run

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="mounts a filesystem, so it needs root")


@contextmanager
def stuck(memfs: Memfs, directory: Path, what: str) -> Iterator[None]:
    """Have a client send a descriptor that is closed, or looked at, for as long as the block."""
    mountpoint = directory / "stuck"
    mountpoint.mkdir()
    command = [sys.executable, "-m", "tests.e2e.stuck_filesystem", str(mountpoint), str(memfs.socket), what]
    root = Path(__file__).parents[2]
    with subprocess.Popen(command, stdout=subprocess.PIPE, cwd=root, start_new_session=True) as hostile:
        try:
            assert hostile.stdout is not None
            assert hostile.stdout.readline() == b"asked\n"
            if what == "epoll":  # it is said before the descriptor is sent
                until(lambda: "anon_inode:[eventpoll]" in held_by(closer_of(memfs)))
            yield
        finally:
            os.killpg(hostile.pid, signal.SIGKILL)
            umount(str(mountpoint), MNT_DETACH)


def child_of(pid: int) -> int:
    """Return the one child of a process."""
    (child,) = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    return int(child)


def forker_of(memfs: Memfs) -> int:
    """Return the process that forks what closes descriptors for a daemon."""
    return child_of(memfs.process.pid)


def closer_of(memfs: Memfs) -> int:
    """Return the process that closes descriptors for a daemon."""
    return child_of(forker_of(memfs))


def held_by(pid: int) -> list[str]:
    """What a process's descriptors are of."""
    return [os.readlink(f"/proc/{pid}/fd/{fd}") for fd in os.listdir(f"/proc/{pid}/fd")]


@pytest.mark.parametrize("what", ["file", "epoll"])
def test_killed_daemon_is_gone(memfs: Memfs, tmp_path: Path, what: str) -> None:
    closer = closer_of(memfs)
    with stuck(memfs, tmp_path, what):
        memfs.process.kill()
        assert memfs.process.wait(10) == -signal.SIGKILL
        with raises(errno.ENOTCONN):
            os.statvfs(memfs.path)
        again = run(*memfs_command("mount", memfs.path, "-o", "size=1m", "--socket", memfs.socket), timeout=30)
        assert again.returncode == 0, again.stderr
        (memfs.path / "file").write_text("content")
        subprocess.run(["umount", memfs.path], check=True)
    until(lambda: not os.path.exists(f"/proc/{closer}"))


@pytest.mark.parametrize("what", ["file", "epoll"])
@pytest.mark.parametrize("how", ["SIGTERM", "umount"])
def test_daemon_that_is_told_to_end_is_gone(memfs: Memfs, tmp_path: Path, what: str, how: str) -> None:
    closer = closer_of(memfs)
    with stuck(memfs, tmp_path, what):
        if how == "umount":
            subprocess.run(["umount", memfs.path], check=True)
        else:
            memfs.process.send_signal(signal.SIGTERM)
        memfs.see_end()
    until(lambda: not os.path.exists(f"/proc/{closer}"))


@pytest.mark.parametrize(("process", "sockets"), [(closer_of, 2), (forker_of, 1)], ids=["closer", "forker"])
def test_closer_holds_nothing_of_the_daemon_s(memfs: Memfs, process: Callable[[Memfs], int], sockets: int) -> None:
    (memfs.path / "file").write_text("content")
    pid = process(memfs)
    assert all(link == "/dev/null" or link.startswith("socket:") for link in held_by(pid))
    assert len(held_by(pid)) == 3 + sockets
    status = dict(line.split(":\t", 1) for line in Path(f"/proc/{pid}/status").read_text().splitlines())
    assert {int(status[name], 16) for name in ("CapEff", "CapPrm", "CapInh", "CapBnd", "CapAmb")} == {0}
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        os.kill(pid, number)
    memfs.process.send_signal(signal.SIGTERM)
    memfs.see_end()
    until(lambda: not os.path.exists(f"/proc/{pid}"))


def populate(memfs: Memfs) -> subprocess.CompletedProcess[str]:
    """Have a client send two descriptors."""
    return memfs.run(*memfs_command("populate", "private", "shared"))


def is_populated(memfs: Memfs) -> bool:
    """Return whether a client could send them; if not, it has been told why."""
    result = populate(memfs)
    assert not result.returncode or "no descriptors left" in result.stderr
    return not result.returncode


@pytest.fixture
def populated(memfs: Memfs) -> Memfs:
    """A mount with what it takes to populate."""
    memfs.expected.append("the closer is gone")
    memfs.run("sh", "-c", "echo content > shared")
    memfs.run(*memfs_command("create", "--seals", "guest", "--size", "1m", "private"))
    return memfs


def test_closer_that_is_killed_is_replaced(populated: Memfs) -> None:
    populated.expected.append("there is another closer")
    for _ in range(2):
        killed = closer_of(populated)
        os.kill(killed, signal.SIGKILL)
        until(lambda: is_populated(populated))
        assert closer_of(populated) != killed
    populated.stop()


def test_without_closer_the_daemon_goes_on(populated: Memfs) -> None:
    populated.expected.append("there can be no other closer")
    closer = closer_of(populated)
    os.kill(forker_of(populated), signal.SIGKILL)
    assert populate(populated).returncode == 0
    os.kill(closer, signal.SIGKILL)
    until(lambda: "there can be no other closer" in populated.log.read_text())
    refused = populate(populated)
    assert refused.returncode == 1
    assert "no descriptors left" in refused.stderr
    assert populated.run("sh", "-c", "echo other > shared && cat shared").stdout == "other\n"
    populated.stop()
