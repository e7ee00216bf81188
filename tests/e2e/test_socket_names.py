"""Whoever mounts a memfs gets a socket and a log of its own, whatever others there are or have been."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing, contextmanager
from pathlib import Path

import pytest

from memfs.contract.sys.unix_address import address_of
from memfs.run_files import default_paths
from tests.helpers import until

from .conftest import Memfs, memfs_command, run, state_of
from .lying_filesystem import lying
from .tools import mount_namespace

needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="mounts in other namespaces, so it needs root")


@contextmanager
def mounted(mountpoint: Path, *options: str, prefix: tuple[str, ...] = ()) -> Iterator[Path]:
    """A memfs mounted the ordinary way, in the background. The value is its socket."""
    mountpoint.mkdir(parents=True, exist_ok=True)
    logs = default_paths(str(mountpoint), "log")[:2]
    result = run(*prefix, *memfs_command("mount", mountpoint, "-o", "size=4m", *options))
    try:
        assert result.returncode == 0, result.stderr
        yield Path(os.fsdecode(os.getxattr(mountpoint, "user.memfs.socket")))
    finally:
        run("umount", "--lazy", mountpoint)
        for log in logs:
            Path(log).unlink(missing_ok=True)


def asked(path: Path) -> bytes:
    """Say what makes no sense to a memfs that listens there, which logs it and hangs up: the answer is empty."""
    with closing(socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)) as client, address_of(str(path)) as address:
        client.connect(address)
        client.send(b"nonsense")
        return client.recv(100)


@pytest.mark.parametrize("said", [False, True])
def test_mount_right_after_umount(can_mount: None, tmp_path: Path, said: bool) -> None:
    mountpoint = tmp_path / "mnt"
    options = ("--socket", str(tmp_path / "socket")) if said else ()
    sockets = set()
    with ExitStack() as stack:
        for _ in range(5):
            sockets.add(stack.enter_context(mounted(mountpoint, *options)))
            run("sh", "-c", "for i in $(seq 500); do echo > $i; done", cwd=mountpoint)
            subprocess.run(["umount", mountpoint], check=True)
        sockets.add(stack.enter_context(mounted(mountpoint, *options)))
        assert sockets == {tmp_path / "socket" if said else Path(default_paths(str(mountpoint), "sock")[0])}
        assert asked(sockets.pop()) == b""


@pytest.mark.parametrize("said", [False, True])
def test_mount_after_lazy_umount(can_mount: None, tmp_path: Path, said: bool) -> None:
    mountpoint = tmp_path / "mnt"
    options = ("--socket", str(tmp_path / "socket")) if said else ()
    with mounted(mountpoint, *options) as before:
        inode = before.stat().st_ino
        with (mountpoint / "file").open("w+") as file:
            subprocess.run(["umount", "--lazy", mountpoint], check=True)
            with mounted(mountpoint, *options) as after:
                assert after == before
                assert after.stat().st_ino != inode
                file.write("still there")
                file.flush()
                assert os.pread(file.fileno(), 100, 0) == b"still there"
                (mountpoint / "new").write_text("content")
                file.close()  # and with it the old one ends
                assert (mountpoint / "new").read_text() == "content"
                assert after.is_socket()
        until(lambda: not after.exists())


def test_mount_of_a_stranger_does_not_keep_the_name(can_mount: None, tmp_path: Path) -> None:
    """It says that it is the one that listens there."""
    mountpoint, strangers = tmp_path / "mnt", tmp_path / "strangers"
    strangers.mkdir()
    with mounted(mountpoint) as before, (mountpoint / "file").open("w"), lying(strangers, str(before), user=12001):
        subprocess.run(["umount", "--lazy", mountpoint], check=True)
        with mounted(mountpoint) as after:
            assert after == before


@needs_root
def test_mount_while_another_namespace_keeps_the_old_one(can_mount: None, tmp_path: Path) -> None:
    mountpoint = tmp_path / "mnt"
    with mounted(mountpoint), subprocess.Popen([*mount_namespace(tmp_path), "sleep", "60"]) as keeper:
        try:
            until(lambda: Path(f"/proc/{keeper.pid}/comm").read_text() == "sleep\n")
            subprocess.run(["umount", mountpoint], check=True)
            with mounted(mountpoint):
                (mountpoint / "file").write_text("new")
                inside = run("nsenter", "-t", str(keeper.pid), "-m", "-r", "ls", mountpoint)
                assert (inside.returncode, inside.stdout) == (0, "")
        finally:
            keeper.kill()


@needs_root
@pytest.mark.parametrize("said", [False, True])
def test_mount_while_another_namespace_has_one_of_its_own(can_mount: None, tmp_path: Path, said: bool) -> None:
    mountpoint = tmp_path / "mnt"
    mountpoint.mkdir()
    options = ["--socket", str(tmp_path / "socket")] if said else []
    command = memfs_command("mount", mountpoint, "-f", "-o", "size=1m", *options)
    with subprocess.Popen([*mount_namespace(tmp_path), *command], stdout=subprocess.PIPE, text=True) as other:
        try:
            assert other.stdout is not None
            assert other.stdout.readline()
            if said:
                refused = run(*memfs_command("mount", mountpoint, "-o", "size=1m", *options))
                assert refused.returncode == 1
                assert "another memfs listens there" in refused.stderr
            else:
                with mounted(mountpoint) as path:
                    assert path != Path(default_paths(str(mountpoint), "sock")[0])
        finally:
            other.send_signal(signal.SIGTERM)
            assert other.wait(10) == 0


def test_mountpoints_of_one_name(can_mount: None, tmp_path: Path) -> None:
    mountpoints = [tmp_path / "x-y", tmp_path / "x" / "y"]
    with mounted(mountpoints[0]) as one, mounted(mountpoints[1]) as other:
        assert one != other
        for mountpoint, path in ((mountpoints[1], other), (mountpoints[0], one)):
            state = state_of(mountpoint)
            assert (state["mountpoint"], state["socket"]) == (str(mountpoint), str(path))
            asked(path)
        logs = [path.with_suffix(".log") for path in (one, other)]
        until(lambda: all(log.exists() and log.read_text().count("broke the protocol") == 1 for log in logs))
    until(lambda: not one.exists() and not other.exists())


def test_logs_of_mountpoints_of_one_name_whose_sockets_are_said(can_mount: None, tmp_path: Path) -> None:
    first, second = tmp_path / "x-y", tmp_path / "x" / "y"
    sockets = [tmp_path / "one", tmp_path / "other"]
    logs = [Path(paths[0]) for paths in (default_paths(str(first), "log"), default_paths(str(second), "log")[1:])]
    with mounted(first, "--socket", str(sockets[0])), mounted(second, "--socket", str(sockets[1])):
        for path, log in zip(sockets, logs, strict=True):
            asked(path)
            until(log.exists)
            until(lambda: log.read_text().count("broke the protocol") == 1)  # noqa: B023


@pytest.mark.parametrize("name", [b"n" * 200, b"\xff\xfe latin", "ü ñ".encode(), b"line\nbreak"])
def test_mountpoint_whose_name_is_no_name_of_a_socket(can_mount: None, tmp_path: Path, name: bytes) -> None:
    mountpoint = tmp_path / "directory" / os.fsdecode(name)
    with mounted(mountpoint) as path:
        assert str(path).isprintable()
        asked(path)
        assert run(*memfs_command("create", "--seals", "guest", "--size", "1m", mountpoint / "private")).returncode == 0
        with (tmp_path / "image").open("wb") as image:
            image.write(b"x" * 5000)
        populated = run(*memfs_command("populate", mountpoint / "private", tmp_path / "image"))
        assert populated.returncode == 0, populated.stderr
        assert run(*memfs_command("stat", mountpoint)).returncode == 0
    until(lambda: not path.exists())


def test_socket_whose_path_is_too_long_for_an_address(can_mount: None, tmp_path: Path) -> None:
    directory = tmp_path / ("d" * 150)
    directory.mkdir()
    with mounted(tmp_path / "mnt", "--socket", str(directory / "socket")) as path:
        assert path == directory / "socket"
        assert run(*memfs_command("create", "--seals", "guest", "--size", "1m", tmp_path / "mnt" / "f")).returncode == 0
        (tmp_path / "image").write_bytes(b"x")
        populated = run(*memfs_command("populate", tmp_path / "mnt" / "f", tmp_path / "image"))
        assert populated.returncode == 0, populated.stderr
    until(lambda: not path.exists())


def test_socket_of_a_mounted_memfs_is_not_taken_by_another_name(memfs: Memfs, tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(memfs.socket.parent)
    (tmp_path / "mnt").mkdir()
    socket_path = tmp_path / "link" / memfs.socket.name
    refused = run(*memfs_command("mount", tmp_path / "mnt", "-o", "size=1m", "--socket", socket_path))
    assert refused.returncode == 1
    assert "another memfs listens there" in refused.stderr
    assert asked(memfs.socket) == b""
    memfs.expected.append("broke the protocol")


def test_socket_of_something_else_is_not_taken(can_mount: None, tmp_path: Path) -> None:
    (tmp_path / "mnt").mkdir()
    with closing(socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)) as other:
        other.bind(str(tmp_path / "socket"))
        other.listen()
        result = run(*memfs_command("mount", tmp_path / "mnt", "-o", "size=1m", "--socket", tmp_path / "socket"))
        assert result.returncode == 1
        assert "listens there" in result.stderr
        assert (tmp_path / "socket").is_socket()


def test_daemons_that_are_started_together_do_not_take_each_other_s(
    mount_memfs: Callable[..., Memfs], tmp_path: Path
) -> None:
    """The one that is first has a socket before it is mounted."""
    commands = [
        memfs_command("mount", tmp_path / name, "-o", "size=1m", "--socket", tmp_path / "socket") for name in "abc"
    ]
    for name in "abc":
        (tmp_path / name).mkdir()
    try:
        started = [subprocess.Popen(command, stderr=subprocess.PIPE, text=True) for command in commands]
        said = [process.communicate(timeout=30)[1] for process in started]
        assert sorted(process.returncode for process in started) == [0, 1, 1], said
        mounted_on = [name for name in "abc" if os.path.ismount(tmp_path / name)]
        assert len(mounted_on) == 1
        assert os.getxattr(tmp_path / mounted_on[0], "user.memfs.socket") == os.fsencode(tmp_path / "socket")
        assert asked(tmp_path / "socket") == b""
    finally:
        for name in "abc":
            run("umount", "--lazy", tmp_path / name)
            Path(default_paths(str(tmp_path / name), "log")[0]).unlink(missing_ok=True)
