"""The socket for owners is handed over by systemd, or by who does as systemd does."""

from __future__ import annotations

import os
import socket
import subprocess
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path

import pytest

from memfs.contract.protocol.connection import Connection, Role
from memfs.contract.protocol.messages import Hello, HelloReply

from .conftest import STOP_TIMEOUT, memfs_command, run
from .tools import needs

MAX_REPLY = 1024


@contextmanager
def activated(mountpoint: Path, path: Path) -> Iterator[subprocess.Popen[str]]:
    """Who listens on a path, and becomes `memfs mount -f` when somebody connects."""
    mountpoint.mkdir()
    command = ["systemd-socket-activate", "--seqpacket", f"--listen={path}", "--fdname=owners"]
    arguments = memfs_command("mount", mountpoint, "-f", "-o", "size=1m")
    with subprocess.Popen([*command, *arguments], stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stderr is not None
            assert "Listening on" in process.stderr.readline()  # the path is there a moment before
            yield process
        finally:
            run("umount", "--lazy", mountpoint)
            process.kill()


@needs("systemd-socket-activate")
def test_owner_that_connects_before_it_is_mounted_has_it_mounted(can_mount: None, tmp_path: Path) -> None:
    mountpoint, path = tmp_path / "mnt", tmp_path / "owners"
    with activated(mountpoint, path) as process:
        with closing(socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)) as owner:
            owner.settimeout(STOP_TIMEOUT)
            owner.connect(str(path))
            connection = Connection(Role.OWNER)
            owner.send(connection.send(Hello(name="early"))[1])
            assert isinstance(connection.receive(owner.recv(MAX_REPLY)).message, HelloReply)
            assert os.path.ismount(mountpoint)
            assert os.getxattr(mountpoint, "user.memfs.socket") == os.fsencode(path)
        assert run("umount", mountpoint).returncode == 0
        assert process.wait(STOP_TIMEOUT) == 0
    assert path.exists()  # it is its manager's


def hand_over(fd: int, mountpoint: Path, *options: str) -> subprocess.CompletedProcess[str]:
    """Mount with one descriptor handed over as systemd does it."""
    mountpoint.mkdir()
    script = f'exec 3<&{fd} && export LISTEN_PID=$$ LISTEN_FDS=1 && exec "$@"'
    command = ["bash", "-c", script, "bash", *memfs_command("mount", mountpoint, "-o", "size=1m", *options)]
    return run(*command, pass_fds=[fd])


@pytest.mark.parametrize(
    "option", [["--socket", "/elsewhere"], ["-o", "socket=/elsewhere"], ["-o", "socket_mode=0666"]]
)
def test_what_the_socket_is_like_is_said_in_one_place(can_mount: None, tmp_path: Path, option: list[str]) -> None:
    with closing(socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)) as sock:
        sock.bind(str(tmp_path / "sock"))
        sock.listen()
        result = hand_over(sock.fileno(), tmp_path / "mnt", *option)
    assert (result.returncode, result.stderr.count("\n")) == (1, 1)
    assert f"{option[0] if option[0] == '--socket' else option[1]}: the socket was handed over" in result.stderr


@pytest.mark.parametrize("what", ["a file", "a stream", "no listener"])
def test_what_is_no_socket_for_owners_is_refused(can_mount: None, tmp_path: Path, what: str) -> None:
    kind = socket.SOCK_STREAM if what == "a stream" else socket.SOCK_SEQPACKET
    with closing(socket.socket(socket.AF_UNIX, kind)) as sock, (tmp_path / "file").open("w") as file:
        if what != "no listener":
            sock.bind(str(tmp_path / "sock"))
            sock.listen()
        result = hand_over(file.fileno() if what == "a file" else sock.fileno(), tmp_path / "mnt")
    assert (result.returncode, result.stderr.count("\n")) == (1, 1)
    assert "handed over" in result.stderr
    assert not os.path.ismount(tmp_path / "mnt")
