"""What root does to a path of another user's: nothing, unless it lies on a memfs, and then nothing but what was asked.

The other user owns the directory, so links, FIFOs, extended attributes and sockets in it are that user's choice.
"""

from __future__ import annotations

import os
import shutil
import socket
import stat
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from memfs.contract.protocol.connection import Connection, Role
from memfs.contract.protocol.messages import VERSION, HelloReply
from memfs.contract.units import PAGE_SIZE

from .conftest import Memfs, memfs_command, run

KVMSIM = [sys.executable, "-m", "kvmsim"]
NOBODY = 65534
CONTENT = "not to be touched\n"

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="being careful with another user's files takes root")


@dataclass
class Home:
    """A directory of another user's, with things in it, and a socket on which that user listens."""

    path: Path
    listener: socket.socket

    def give(self, path: Path) -> None:
        """Make the user the owner of something."""
        os.chown(path, NOBODY, NOBODY, follow_symlinks=False)

    @property
    def was_asked(self) -> bool:
        """Whether anybody has connected."""
        self.listener.setblocking(False)
        try:
            self.listener.accept()[0].close()
        except BlockingIOError:
            return False
        return True


@pytest.fixture
def home() -> Iterator[Home]:
    path = Path(tempfile.mkdtemp(prefix="memfs-test-"))
    try:
        listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        os.setegid(NOBODY)
        os.seteuid(NOBODY)  # who listens is whoever did so (SO_PEERCRED)
        try:
            with tempfile.TemporaryDirectory() as own:  # a directory in which that user may bind
                listener.bind(f"{own}/socket")
                listener.listen()
                os.seteuid(0)
                os.setegid(0)
                os.rename(f"{own}/socket", path / "socket")
        finally:
            os.seteuid(0)
            os.setegid(0)
        home = Home(path, listener)
        home.give(path)
        with listener:
            yield home
    finally:
        shutil.rmtree(path)


def state_of(path: Path) -> tuple[object, ...]:
    """Everything of a file that must not change."""
    status = path.lstat()
    names = os.listxattr(path, follow_symlinks=False)
    content = path.read_bytes() if stat.S_ISREG(status.st_mode) else b""
    return status.st_mode, status.st_size, status.st_mtime_ns, status.st_ctime_ns, tuple(names), content


def commands(path: Path) -> dict[str, list[str]]:
    """Every command that takes a path on a memfs."""
    return {
        "seal": memfs_command("seal", path, "guest"),
        "seals": memfs_command("seals", path),
        "stat": memfs_command("stat", path),
        "stat --json": memfs_command("stat", path, "--json"),
        "remount": memfs_command("remount", path, "-o", "size=1m"),
        "allocate": memfs_command("allocate", path, "--length", "1m"),
        "populate": memfs_command("populate", path, "/etc/hostname"),
        "kvmsim shared": [*KVMSIM, "run", "--shared", str(path), "--private", str(path), "--mem", "4M"],
    }


def tries_in_vain(path: Path, *unchanged: Path) -> None:
    """Try each command; each must fail in one sentence, at once, and change nothing."""
    before = [state_of(each) for each in (path, *unchanged)]
    for name, command in commands(path).items():
        result = run(*command, timeout=20)
        assert (name, result.returncode) == (name, 1), result.stdout
        assert result.stderr.count("\n") == 1, result.stderr
        assert str(path) in result.stderr
        assert [state_of(each) for each in (path, *unchanged)] == before, name


def test_files_of_other_filesystems_are_left_alone(home: Home) -> None:
    """With an attribute that says where to send a descriptor, as a real memfs would."""
    file = home.path / "file"
    file.write_text(CONTENT)
    home.give(file)
    try:
        os.setxattr(file, "user.memfs.socket", os.fsencode(home.path / "socket"))
        os.setxattr(file, "user.memfs.stat", b'{"registry": []}')
        os.setxattr(file, "user.memfs.seals", b"guest")
    except OSError as error:
        pytest.skip(f"no attributes in {home.path}: {error.strerror}")
    tries_in_vain(file)
    tries_in_vain(home.path)
    assert not home.was_asked


@pytest.mark.parametrize("kind", ["fifo", "socket", "null", "missing"])
def test_nothing_is_opened_that_might_wait(home: Home, kind: str) -> None:
    path = home.path / kind
    if kind == "fifo":
        os.mkfifo(path)
    elif kind == "null":
        os.mknod(path, stat.S_IFCHR | 0o666, os.makedev(1, 3))
    if kind == "missing":
        result = run(*memfs_command("seals", path))
        assert (result.returncode, result.stderr) == (1, f"memfs: {path}: No such file or directory\n")
    else:
        home.give(path)
        tries_in_vain(path)


def test_fifos_on_a_memfs_are_not_opened_either(memfs: Memfs) -> None:
    fifo = memfs.path / "fifo"
    os.mkfifo(fifo)
    for name in ("allocate", "populate", "kvmsim shared"):
        result = run(*commands(fifo)[name], timeout=20)
        assert (result.returncode, result.stderr.split(": ", 1)[1]) == (1, f"{fifo}: not a regular file\n")


def test_links_to_files_are_not_followed(home: Home, memfs: Memfs) -> None:
    """Not even to files of a memfs: the link's owner would choose which is truncated, sealed and given away."""
    secret = memfs.path / "secret"
    secret.write_text(CONTENT)
    link = home.path / "link"
    for target in (Path("/etc/passwd"), secret):
        link.unlink(missing_ok=True)
        link.symlink_to(target)
        home.give(link)
        tries_in_vain(link, target)
    inside = memfs.path / "link"
    inside.symlink_to("secret")
    for name, command in commands(inside).items():
        if name not in ("stat", "stat --json", "remount"):  # those are about the mount, and the link is root's
            assert run(*command).returncode == 1, name
    assert secret.read_text() == CONTENT


def test_links_of_strangers_on_the_way_are_not_followed(home: Home, memfs: Memfs) -> None:
    secret = memfs.path / "secret"
    secret.write_text(CONTENT)
    (home.path / "way").symlink_to(memfs.path)
    own = home.path / "own"
    own.symlink_to(memfs.path)
    home.give(home.path / "way")
    tries_in_vain(home.path / "way" / "secret")
    assert run(*memfs_command("create", home.path / "way" / "new")).returncode == 1
    assert not (memfs.path / "new").exists()
    # Those that root made are: /var/run is one.
    assert run(*memfs_command("seals", own / "secret")).returncode == 0
    assert run(*memfs_command("create", own / "new")).returncode == 0
    assert run(*memfs_command("stat", own)).returncode == 0
    assert run(*memfs_command("stat", f"{own}/")).returncode == 0


def test_create_makes_files_on_a_memfs_only(home: Home) -> None:
    for options in ([], ["--size", "1m"], ["--seals", "guest"], ["--allocate", "--size", "1m"]):
        result = run(*memfs_command("create", home.path / "new", *options))
        assert (result.returncode, result.stderr) == (1, f"memfs: {home.path}: does not lie on a memfs\n")
    assert sorted(each.name for each in home.path.iterdir()) == ["socket"]


def test_no_descriptor_is_sent_to_a_stranger(home: Home, memfs: Memfs) -> None:
    """Who listens there may have put the socket in the place of memfs's."""
    for name, options in (("shared", []), ("private", ["--seals", "guest"])):
        assert run(*memfs_command("create", memfs.path / name, *options)).returncode == 0
    home.listener.settimeout(20)
    files = ["--shared", str(memfs.path / "shared"), "--private", str(memfs.path / "private")]
    command = [*KVMSIM, "run", *files, "--mem", "4M", "--socket", str(home.path / "socket")]
    store = Connection(Role.STORE)
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as kvmsim:
        with home.listener.accept()[0] as connection:
            connection.settimeout(20)
            hello = store.receive(connection.recv(1 << 16))
            connection.send(store.send(HelloReply(VERSION, PAGE_SIZE), answers=hello.id)[1])
            assert socket.recv_fds(connection, 1 << 16, 8)[:2] == (b"", [])
        assert f"user {NOBODY} listens on the socket" in kvmsim.communicate(timeout=20)[1]
    assert kvmsim.returncode == 1
    assert [(memfs.path / name).stat().st_size for name in ("shared", "private")] == [0, 0]
