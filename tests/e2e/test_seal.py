"""The guest seal on a real mount: every way to set it, every way in that it closes, and what is refused."""

from __future__ import annotations

import errno
import fcntl
import mmap
import os
import signal
import struct
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from memfs.store.seals import F_SEAL_GUEST, MEMFS_IOC_ADD_SEALS, MEMFS_IOC_GET_SEALS
from tests.helpers import raises

from .conftest import Memfs, MountMemfs, memfs_command, run
from .tools import skip_without

PASSTHROUGH = pytest.mark.parametrize("passthrough", ["auto", "off"])


def seals_of(path: Path) -> str:
    return os.getxattr(path, "user.memfs.seals").decode()


def by_setfattr(path: Path) -> None:
    path.touch()
    subprocess.run(["setfattr", "-n", "user.memfs.seals", "-v", "guest", path], check=True)


def by_command(path: Path) -> None:
    path.touch()
    subprocess.run(memfs_command("seal", path, "guest"), check=True)


def by_create(path: Path) -> None:
    subprocess.run(memfs_command("create", "--seals", "guest", path), check=True)


def by_default_seals(path: Path) -> None:
    os.setxattr(path.parent, "user.memfs.default_seals", b"guest")
    path.touch()
    os.removexattr(path.parent, "user.memfs.default_seals")


def by_ioctl(path: Path) -> None:
    path.touch()
    fd = os.open(path, os.O_ACCMODE)
    fcntl.ioctl(fd, MEMFS_IOC_ADD_SEALS, struct.pack("=I", F_SEAL_GUEST))
    os.close(fd)


WAYS = [by_setfattr, by_command, by_create, by_default_seals, by_ioctl]


@PASSTHROUGH
@pytest.mark.parametrize("seal", WAYS)
def test_sealed_file_is_closed_to_the_host(
    mount_memfs: MountMemfs, passthrough: str, seal: Callable[[Path], None]
) -> None:
    if seal is by_setfattr:
        skip_without("setfattr")
    memfs = mount_memfs(f"size=64m,passthrough={passthrough}")
    path = memfs.path / "file"
    seal(path)
    assert seals_of(path) == "guest"
    assert run(*memfs_command("seals", path)).stdout == "guest\n"
    os.truncate(path, 1 << 20)
    fd = os.open(path, os.O_RDWR)
    assert struct.unpack("=I", fcntl.ioctl(fd, MEMFS_IOC_GET_SEALS, bytes(4))) == (F_SEAL_GUEST,)
    os.posix_fallocate(fd, 0, 8192)
    for attempt in (lambda: os.pread(fd, 1, 0), lambda: os.pwrite(fd, b"x", 0), lambda: os.sendfile(1, fd, 0, 1)):
        with pytest.raises(PermissionError):
            attempt()
    with raises(errno.ENODEV):
        mmap.mmap(fd, 4096)
    os.close(fd)
    cat = run("cat", path)
    assert (cat.returncode, cat.stdout) == (1, "")
    assert "Operation not permitted" in cat.stderr


def test_private_mapping_of_a_sealed_file_cannot_be_touched(memfs: Memfs) -> None:
    path = memfs.path / "file"
    by_create(path)
    os.truncate(path, 8192)
    script = f"import mmap; f = open({str(path)!r}, 'r+b', 0); mmap.mmap(f.fileno(), 4096, mmap.MAP_PRIVATE)[0]"
    assert run(sys.executable, "-c", script).returncode == -signal.SIGBUS


def test_sizes_and_punches_of_a_sealed_file_are_page_aligned(memfs: Memfs) -> None:
    path = memfs.path / "file"
    by_create(path)
    assert memfs.run("fallocate", "-l", "64K", "file").returncode == 0
    before = memfs.run("stat", "-c", "%s %b", "file").stdout
    for command in (
        ("fallocate", "-p", "-o", "100", "-l", "4096"),
        ("fallocate", "-p", "-o", "4096", "-l", "100"),
        ("fallocate", "-o", "4096", "-l", "100"),
        ("truncate", "-s", "5000"),
    ):
        result = memfs.run(*command, "file")
        assert result.returncode == 1
        assert "Invalid argument" in result.stderr
        assert memfs.run("stat", "-c", "%s %b", "file").stdout == before
    assert memfs.run("fallocate", "-p", "-o", "4096", "-l", "4096", "file").returncode == 0
    assert memfs.run("stat", "-c", "%s %b", "file").stdout == "65536 120\n"
    assert memfs.run("truncate", "-s", "32K", "file").returncode == 0
    assert memfs.run("stat", "-c", "%s %b", "file").stdout == "32768 56\n"


def test_seek_on_a_sealed_file_finds_what_is_allocated(memfs: Memfs) -> None:
    path = memfs.path / "file"
    by_create(path)
    os.truncate(path, 1 << 20)
    assert memfs.run("fallocate", "-o", "64K", "-l", "8K", "file").returncode == 0
    fd = os.open(path, os.O_RDONLY)
    assert os.lseek(fd, 0, os.SEEK_DATA) == 64 << 10
    assert os.lseek(fd, 64 << 10, os.SEEK_HOLE) == 72 << 10
    with raises(errno.ENXIO):
        os.lseek(fd, 72 << 10, os.SEEK_DATA)
    os.close(fd)


def test_file_that_is_not_empty_cannot_be_sealed(memfs: Memfs) -> None:
    path = memfs.path / "file"
    path.write_bytes(b"content")
    with raises(errno.EBUSY):
        os.setxattr(path, "user.memfs.seals", b"guest")
    assert seals_of(path) == ""
    assert path.read_bytes() == b"content"


@PASSTHROUGH
def test_file_that_could_be_mapped_cannot_be_sealed(mount_memfs: MountMemfs, passthrough: str) -> None:
    path = mount_memfs(f"size=64m,passthrough={passthrough}").path / "file"
    fd = os.open(path, os.O_CREAT | os.O_RDWR)
    os.ftruncate(fd, 4096)
    mapping = mmap.mmap(fd, 4096)
    os.ftruncate(fd, 0)
    os.close(fd)  # the mapping keeps it open
    with raises(errno.EBUSY):
        os.setxattr(path, "user.memfs.seals", b"guest")
    assert seals_of(path) == ""
    mapping.close()
    os.setxattr(path, "user.memfs.seals", b"guest")
    assert seals_of(path) == "guest"


def test_ioctl_on_an_ordinary_handle_is_busy(memfs: Memfs) -> None:
    fd = os.open(memfs.path / "file", os.O_CREAT | os.O_RDWR)
    with raises(errno.EBUSY):
        fcntl.ioctl(fd, MEMFS_IOC_ADD_SEALS, struct.pack("=I", F_SEAL_GUEST))
    with raises(errno.EINVAL):
        fcntl.ioctl(fd, MEMFS_IOC_ADD_SEALS, struct.pack("=I", 1 << 20))
    with raises(errno.ENOTTY):
        fcntl.ioctl(fd, 0x12345678)
    os.close(fd)
    fd = os.open(memfs.path / "file", os.O_RDONLY | os.O_DIRECT)
    with pytest.raises(PermissionError):
        fcntl.ioctl(fd, MEMFS_IOC_ADD_SEALS, struct.pack("=I", F_SEAL_GUEST))
    os.close(fd)
    assert seals_of(memfs.path / "file") == ""


def test_closing_before_sealing_is_enough(memfs: Memfs) -> None:
    """close(2) does not wait for the server, so the seal must not overtake it."""
    for number in range(300):
        path = memfs.path / str(number)
        path.write_bytes(b"")
        os.setxattr(path, "user.memfs.seals", b"guest")


def test_seal_gives_back_what_was_allocated_beyond_the_end(memfs: Memfs) -> None:
    (memfs.path / "file").touch()
    assert memfs.run("fallocate", "-n", "-l", "8M", "file").returncode == 0
    assert memfs.run("df", "--output=used", ".").stdout.split()[-1] == "8192"
    os.setxattr(memfs.path / "file", "user.memfs.seals", b"guest")
    assert memfs.run("df", "--output=used", ".").stdout.split()[-1] == "0"


def test_seals_stay_and_unknown_ones_are_refused(memfs: Memfs) -> None:
    path = memfs.path / "file"
    by_create(path)
    os.setxattr(path, "user.memfs.seals", b"guest")  # again is fine
    with pytest.raises(PermissionError):
        os.removexattr(path, "user.memfs.seals")
    with raises(errno.EINVAL):
        os.setxattr(path, "user.memfs.seals", b"guest,nonsense")
    with raises(errno.EINVAL):
        os.setxattr(memfs.path, "user.memfs.default_seals", b"nonsense")
    with raises(errno.EOPNOTSUPP):
        os.setxattr(path, "user.memfs.nonsense", b"1")
    os.setxattr(path, "user.memfs.seals", b"seal")
    with pytest.raises(PermissionError):
        os.setxattr(path, "user.memfs.seals", b"guest")
    assert seals_of(path) == "seal,guest"
    assert "user.memfs.seals" in os.listxattr(path)
    assert os.listxattr(memfs.path) == []


def test_ordinary_and_guest_memory_share_one_limit(memfs: Memfs) -> None:
    by_create(memfs.path / "guest")
    assert memfs.run("fallocate", "-l", "40M", "guest").returncode == 0
    full = memfs.run("fallocate", "-l", "40M", "ordinary")
    assert "No space left on device" in full.stderr
    assert memfs.run("fallocate", "-l", "20M", "ordinary").returncode == 0
    full = memfs.run("fallocate", "-o", "40M", "-l", "8M", "guest")
    assert "No space left on device" in full.stderr
    assert memfs.run("df", "--output=used", ".").stdout.split()[-1] == str(60 << 10)
    assert memfs.run("fallocate", "-p", "-l", "32M", "guest").returncode == 0
    assert memfs.run("fallocate", "-l", "40M", "ordinary").returncode == 0


def test_create_refuses_what_exists_and_leaves_nothing_half_made(memfs: Memfs, tmp_path: Path) -> None:
    (memfs.path / "file").write_bytes(b"x")
    result = run(*memfs_command("create", "--seals", "guest", memfs.path / "file"))
    assert (result.returncode, result.stderr.count("\n")) == (1, 1)
    assert (memfs.path / "file").read_bytes() == b"x"
    elsewhere = run(*memfs_command("create", "--seals", "guest", tmp_path / "file"))
    assert elsewhere.returncode == 1
    assert not (tmp_path / "file").exists()
