"""O_DIRECT: opened as all others are; and the handle for ioctl only, by which one seals."""

from __future__ import annotations

import errno
import fcntl
import mmap
import os
import signal
import struct
import subprocess
import sys
from pathlib import Path

import pytest

from memfs.store.seals import F_SEAL_GUEST, MEMFS_IOC_ADD_SEALS
from tests.helpers import raises

from .conftest import Memfs, MountMemfs, memfs_command, run, stat_json

PASSTHROUGH = pytest.mark.parametrize("passthrough", ["auto", "off"])

#: Opens and closes a file until its input ends, and prints which errors there were
OPENS = """
import errno, os, select, sys
errors = set()
while not select.select([0], [], [], 0)[0]:
    for _ in range(100):
        try:
            os.close(os.open(sys.argv[1], os.O_RDWR | int(sys.argv[2])))
        except OSError as error:
            errors.add(errno.errorcode[error.errno])
print(sorted(errors))
"""


def _write_and_read(path: Path) -> None:
    buffer = mmap.mmap(-1, 1 << 20)
    buffer[:] = os.urandom(len(buffer))
    again = mmap.mmap(-1, len(buffer))
    fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_DIRECT)
    try:
        assert os.pwrite(fd, buffer, 0) == len(buffer)
        assert os.preadv(fd, [again], 0) == len(buffer)
        assert again[:] == buffer[:] == path.read_bytes()
    finally:
        os.close(fd)


#: Writes with O_DIRECT, whereupon the kernel asks whether the file has capabilities; and reads and writes when told to
WRITES = """
import mmap, os, sys
fd = os.open(sys.argv[1], os.O_RDWR | os.O_DIRECT)
buffer = mmap.mmap(-1, 1 << 20)
assert os.pwrite(fd, buffer, 0) == len(buffer)
print("open", flush=True)
input()
assert os.pwrite(fd, buffer, 0) == os.preadv(fd, [buffer], 0) == len(buffer)
"""


def test_daemon_is_not_asked_for_content(memfs: Memfs) -> None:
    if not stat_json(memfs.path)["passthrough"]:
        pytest.skip("no passthrough here")
    (memfs.path / "file").touch()
    command = [sys.executable, "-c", WRITES, str(memfs.path / "file")]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as writer:
        assert writer.stdout is not None
        assert writer.stdout.readline() == "open\n"
        memfs.process.send_signal(signal.SIGSTOP)
        try:
            writer.communicate("now\n", timeout=20)
        finally:
            memfs.process.send_signal(signal.SIGCONT)
    assert writer.returncode == 0


@PASSTHROUGH
def test_direct_handle_reads_writes_and_maps_as_on_tmpfs(
    mount_memfs: MountMemfs, tmpfs: Path, passthrough: str
) -> None:
    for directory in (tmpfs, mount_memfs(f"size=64m,passthrough={passthrough}").path):
        path = directory / "file"
        _write_and_read(path)
        fds = [os.open(path, os.O_RDWR), os.open(path, os.O_RDWR | os.O_DIRECT)]
        mappings = [mmap.mmap(fd, 4096, mmap.MAP_SHARED) for fd in fds]
        mappings[0][0], mappings[1][1] = 65, 66
        assert [bytes(mapping[:2]) for mapping in mappings] == [b"AB"] * 2
        assert path.read_bytes()[:2] == b"AB"
        for mapping, fd in zip(mappings, fds, strict=True):
            mapping.close()
            os.close(fd)


@PASSTHROUGH
def test_ordinary_and_direct_opens_race_and_none_fails(mount_memfs: MountMemfs, passthrough: str) -> None:
    path = mount_memfs(f"size=64m,passthrough={passthrough}").path / "file"
    path.write_bytes(bytes(4096))
    openers = [
        subprocess.Popen(
            [sys.executable, "-c", OPENS, path, str(int(flags))],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        for flags in (0, os.O_DIRECT)
    ]
    with pytest.raises(subprocess.TimeoutExpired):
        openers[0].wait(2)
    assert [opener.communicate()[0] for opener in openers] == ["[]\n"] * 2


# -- the handle for ioctl only -----------------------------------------------------------------------------------------


@PASSTHROUGH
def test_handle_for_ioctl_only_seals_and_does_nothing_else(mount_memfs: MountMemfs, passthrough: str) -> None:
    path = mount_memfs(f"size=64m,passthrough={passthrough}").path / "file"
    path.write_bytes(bytes(4096))
    fd = os.open(path, os.O_ACCMODE)
    for attempt in (
        lambda: os.pread(fd, 1, 0),
        lambda: os.pwrite(fd, b"x", 0),
        lambda: mmap.mmap(fd, 4096, mmap.MAP_SHARED, mmap.PROT_READ),
        lambda: mmap.mmap(fd, 4096, mmap.MAP_PRIVATE, mmap.PROT_READ),
        lambda: os.posix_fallocate(fd, 0, 4096),
    ):
        with raises(errno.EBADF, errno.EACCES):
            attempt()
    os.truncate(path, 0)
    with path.open("rb"), raises(errno.EBUSY):
        _seal(fd, F_SEAL_GUEST)
    _seal(fd, F_SEAL_GUEST)
    os.close(fd)
    assert os.getxattr(path, "user.memfs.seals") == b"guest"


@PASSTHROUGH
def test_one_that_came_while_others_had_the_file_open_seals_when_opened_again(
    mount_memfs: MountMemfs, passthrough: str
) -> None:
    path = mount_memfs(f"size=64m,passthrough={passthrough}").path / "file"
    with path.open("wb"):
        fd = os.open(path, os.O_ACCMODE)
        with raises(errno.EBUSY):
            _seal(fd, F_SEAL_GUEST)
    os.close(fd)
    fd = os.open(path, os.O_ACCMODE)
    _seal(fd, F_SEAL_GUEST)
    os.close(fd)


def test_it_takes_the_permission_to_write(memfs: Memfs) -> None:
    path = memfs.path / "file"
    path.touch(0o400)
    script = f"import os; os.setuid(65534); os.open({str(path)!r}, 3)"
    assert "PermissionError" in run(sys.executable, "-c", script).stderr


@pytest.mark.parametrize("names", ["grow,shrink", "grow,shrink,seal", "write", "guest,grow,shrink", "guest,seal"])
@pytest.mark.parametrize("options", ["size=64m", "size=64m,backing=memfd"])
def test_create_sizes_and_allocates_before_it_seals_the_size(mount_memfs: MountMemfs, options: str, names: str) -> None:
    path = mount_memfs(options).path / "file"
    created = run(*memfs_command("create", "--seals", names, "--size", "8k", "--allocate", path))
    assert created.returncode == 0, created.stderr
    assert (path.stat().st_size, path.stat().st_blocks) == (8192, 16)
    assert set(os.getxattr(path, "user.memfs.seals").decode().split(",")) == set(names.split(","))


def _seal(fd: int, bits: int) -> None:
    fcntl.ioctl(fd, MEMFS_IOC_ADD_SEALS, struct.pack("=I", bits))
