"""A memfs unmounts its own mount and nothing else, and one that is mounted in place of a dead one is never away."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from memfs.contract.sys.libc import mount
from memfs.contract.sys.mountinfo import mounts_on, type_of_device

from .conftest import Memfs, memfs_command, run, start_memfs

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="mounts other filesystems, so it needs root")


@contextmanager
def nothing_left_on(*mountpoints: Path) -> Iterator[None]:
    """Unmount, in the end, whatever there is."""
    try:
        yield
    finally:
        for mountpoint in mountpoints:
            while mounts_on(str(mountpoint)):
                subprocess.run(["umount", "--lazy", mountpoint], check=True)


@contextmanager
def foreground(mountpoint: Path, socket: Path) -> Iterator[subprocess.Popen[str]]:
    """Mount a memfs on a directory on which there may be something, and kill it in the end."""
    command = memfs_command("mount", mountpoint, "-f", "--socket", socket, "-o", "size=1m")
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            assert process.stdout.readline() == f"memfs: {mountpoint} is mounted\n"
            yield process
        finally:
            process.kill()


def kinds(mountpoint: Path) -> list[str | None]:
    """Return the types of what is mounted on a directory, the one that is seen first."""
    return [type_of_device(device) for _, device in mounts_on(str(mountpoint))]


def test_what_is_mounted_in_place_of_it_stays(can_mount: None, tmp_path_factory: pytest.TempPathFactory) -> None:
    for _ in range(6):
        directory = tmp_path_factory.mktemp("memfs")
        memfs = start_memfs(directory, "size=8m")
        try:
            with nothing_left_on(memfs.path):
                memfs.run("sh", "-c", "for i in $(seq 200); do echo > $i; done")  # so that its end takes a while
                script = 'umount "$1" && mount -t tmpfs x "$1" && echo kept > "$1/file"'
                assert run("sh", "-c", script, "sh", memfs.path).returncode == 0
                assert memfs.process.wait(10) == 0
                assert (memfs.path / "file").read_text() == "kept\n"
        finally:
            memfs.kill()


@pytest.mark.parametrize("end", ["close", "SIGTERM"])
def test_new_one_outlives_a_lazily_unmounted_one(mount_memfs: Callable[..., Memfs], tmp_path: Path, end: str) -> None:
    old = mount_memfs()
    with nothing_left_on(old.path), (old.path / "file").open("wb") as last_user:
        subprocess.run(["umount", "--lazy", old.path], check=True)
        with foreground(old.path, tmp_path / "socket"):
            (old.path / "new").write_text("kept")
            if end == "close":
                last_user.close()
            else:
                old.process.send_signal(signal.SIGTERM)
            assert old.process.wait(10) == 0
            assert (old.path / "new").read_text() == "kept"
            assert kinds(old.path) == ["fuse.memfs"]


def test_what_is_mounted_on_top_of_it_stays(mount_memfs: Callable[..., Memfs]) -> None:
    memfs = mount_memfs()
    with nothing_left_on(memfs.path):
        subprocess.run(["mount", "-t", "tmpfs", "x", memfs.path], check=True)
        (memfs.path / "file").write_text("kept")
        memfs.process.send_signal(signal.SIGTERM)
        assert memfs.process.wait(10) == 0
        assert (memfs.path / "file").read_text() == "kept"
        assert "another filesystem is mounted on it" in memfs.log.read_text()


def test_it_is_unmounted_where_it_was_moved(mount_memfs: Callable[..., Memfs], tmp_path: Path) -> None:
    memfs = mount_memfs()
    moved = tmp_path / "moved"
    moved.mkdir()
    with nothing_left_on(memfs.path, moved):
        if run("mount", "--move", memfs.path, moved).returncode:
            pytest.skip("below a shared mount nothing can be moved")
        (moved / "file").write_text("content")
        subprocess.run(["mount", "-t", "tmpfs", "x", memfs.path], check=True)
        memfs.process.send_signal(signal.SIGTERM)
        assert memfs.process.wait(10) == 0
        assert kinds(moved) == []
        assert kinds(memfs.path) == ["tmpfs"]


CREATE_WITHOUT_END = """
import errno, os, sys
print("ready", flush=True)
number = created = 0
while not os.path.exists(sys.argv[2]):
    number += 1
    try:
        os.close(os.open(f"{sys.argv[1]}/{number}", os.O_CREAT | os.O_WRONLY))
        created += 1
        os.unlink(f"{sys.argv[1]}/{number}")
    except OSError as error:
        assert error.errno in (errno.ENOTCONN, errno.ECONNABORTED, errno.ENOENT), error
print(created)
"""


@pytest.mark.parametrize("dead", [1, 2])
def test_directory_is_never_seen_while_a_dead_one_is_replaced(can_mount: None, tmp_path: Path, dead: int) -> None:
    """Somebody creates files all the time, and none of them is created in the directory itself."""
    mountpoint, stop = tmp_path / "mnt", tmp_path / "stop"
    mountpoint.mkdir()
    before = mountpoint.stat().st_mtime_ns
    with nothing_left_on(mountpoint):
        for _ in range(dead):
            fuse = os.open("/dev/fuse", os.O_RDWR | os.O_CLOEXEC)
            mount("memfs", str(mountpoint), "fuse.memfs", 0, f"fd={fuse},rootmode=40000,user_id=0,group_id=0")
            os.close(fuse)
        command = [sys.executable, "-c", CREATE_WITHOUT_END, str(mountpoint), str(stop)]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as writer:
            assert writer.stdout is not None
            assert writer.stdout.readline() == "ready\n"
            for _ in range(4):
                with foreground(mountpoint, tmp_path / "socket"):
                    assert kinds(mountpoint) == ["fuse.memfs"]
            stop.touch()
            assert int(writer.stdout.read()) > 0
        assert writer.returncode == 0
    assert mountpoint.stat().st_mtime_ns == before
