"""Ways to get at the content of a file, each a function of its path that returns all that it got.

Run as `python ways_in.py WAY PATH [PID]`, it writes what it got to standard output and why it got no more to standard
error. A process of its own, because some of these end with SIGBUS, and because whoever runs it may be nobody; so it
imports nothing of the project. PID is a process that has the content: the daemon or an owner.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import re
import socket
import struct
import subprocess
import sys
from collections.abc import Callable
from typing import Final

SIZE: Final = 2 * mmap.PAGESIZE  # bytes that are worth looking at
MARK: Final = b"SECRET OF THE "  # what is worth looking at in a process's memory
_libc = ctypes.CDLL(None, use_errno=True)
_libc.syscall.restype = ctypes.c_long
_libc.mmap.restype = ctypes.c_void_p
_libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_int64]
_MADV_POPULATE_READ: Final = 22
_PTRACE_ATTACH: Final = 16
_IO_URING_SETUP, _IO_URING_ENTER, _IORING_OP_READ = 425, 426, 22


def _checked(result: int) -> int:
    if result < 0:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
    return result


def _open(path: str, flags: int = os.O_RDONLY) -> int:
    return os.open(path, flags)


def read(path: str) -> bytes:
    return os.read(_open(path), SIZE)


def read_write_descriptor(path: str) -> bytes:
    return os.read(_open(path, os.O_RDWR), SIZE)


def pread(path: str) -> bytes:
    return os.pread(_open(path), SIZE, 0)


def readv(path: str) -> bytes:
    buffers = [bytearray(SIZE // 2), bytearray(SIZE // 2)]
    os.readv(_open(path), buffers)
    return b"".join(buffers)


def preadv2_nowait(path: str) -> bytes:
    buffer = bytearray(SIZE)
    os.preadv(_open(path), [buffer], 0, os.RWF_NOWAIT)
    return bytes(buffer)


def direct(path: str) -> bytes:
    buffer = mmap.mmap(-1, SIZE)
    os.readv(_open(path, os.O_RDONLY | os.O_DIRECT), [buffer])
    return buffer[:]


def splice(path: str) -> bytes:
    reader, writer = os.pipe()
    os.splice(_open(path), writer, SIZE)
    os.close(writer)
    return os.read(reader, SIZE)


def sendfile(path: str) -> bytes:
    ours, theirs = socket.socketpair()
    os.sendfile(theirs.fileno(), _open(path), 0, SIZE)
    theirs.close()
    return ours.recv(SIZE)


def copy_file_range(path: str) -> bytes:
    """On the same mount, where the filesystem itself might copy."""
    copy = os.open(os.path.dirname(path), os.O_TMPFILE | os.O_RDWR, 0o600)
    os.copy_file_range(_open(path), copy, SIZE)
    return os.pread(copy, SIZE, 0)


def reflink(path: str) -> bytes:
    copy = os.open(os.path.dirname(path), os.O_TMPFILE | os.O_RDWR, 0o600)
    _checked(_libc.ioctl(copy, 0x40049409, _open(path)))  # FICLONE
    return os.pread(copy, SIZE, 0)


def mmap_shared(path: str) -> bytes:
    return mmap.mmap(_open(path), SIZE, mmap.MAP_SHARED, mmap.PROT_READ)[:]


def mmap_private(path: str) -> bytes:
    return mmap.mmap(_open(path), SIZE, mmap.MAP_PRIVATE, mmap.PROT_READ)[:]


def mmap_writable(path: str) -> bytes:
    return mmap.mmap(_open(path, os.O_RDWR), SIZE)[:]


def _map(path: str) -> int:
    address = _libc.mmap(None, SIZE, mmap.PROT_READ, mmap.MAP_PRIVATE, _open(path), 0)
    if address == ctypes.c_void_p(-1).value:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
    return int(address)


def populate(path: str) -> bytes:
    """Have the kernel fault a mapping in, and look at it then."""
    address = _map(path)
    _checked(_libc.madvise(ctypes.c_void_p(address), ctypes.c_size_t(SIZE), _MADV_POPULATE_READ))
    return ctypes.string_at(address, SIZE)


def write_from_mapping(path: str) -> bytes:
    """Have the kernel read a mapping."""
    reader, writer = os.pipe()
    _checked(_libc.write(writer, ctypes.c_void_p(_map(path)), ctypes.c_size_t(SIZE)))
    return os.read(reader, SIZE)


class _Iovec(ctypes.Structure):
    _fields_ = (("base", ctypes.c_void_p), ("length", ctypes.c_size_t))


def _process_vm_readv(pid: int, address: int, size: int) -> bytes:
    buffer = ctypes.create_string_buffer(size)
    ours, theirs = _Iovec(ctypes.addressof(buffer), size), _Iovec(address, size)
    got = _libc.process_vm_readv(pid, ctypes.byref(ours), 1, ctypes.byref(theirs), 1, 0)
    return buffer.raw[: _checked(got)]


def process_vm_readv_of_mapping(path: str) -> bytes:
    return _process_vm_readv(os.getpid(), _map(path), SIZE)


def own_memory(path: str) -> bytes:
    """/proc/self/mem of a mapping."""
    return os.pread(_open("/proc/self/mem"), SIZE, _map(path))


def io_uring(path: str) -> bytes:
    """A read that a ring does: struct io_uring_params, one entry, the smallest ring there is (io_uring_setup(2))."""
    parameters = bytearray(120)
    ring = _checked(_libc.syscall(_IO_URING_SETUP, 1, (ctypes.c_char * 120).from_buffer(parameters)))
    # struct io_sqring_offsets at 40: head, tail, mask, entries, flags, dropped, array; io_cqring_offsets at 80
    tail, array = struct.unpack_from("I", parameters, 44)[0], struct.unpack_from("I", parameters, 64)[0]
    cqes = struct.unpack_from("I", parameters, 100)[0]
    queue = mmap.mmap(ring, max(array + 4, cqes + 32), mmap.MAP_SHARED, offset=0)
    entries = mmap.mmap(ring, 64, mmap.MAP_SHARED, offset=0x10000000)  # IORING_OFF_SQES
    completions = queue if struct.unpack_from("I", parameters, 20)[0] & 1 else None  # IORING_FEAT_SINGLE_MMAP
    if completions is None:
        raise OSError("this kernel's rings are laid out in another way")
    buffer = ctypes.create_string_buffer(SIZE)
    entries[:64] = struct.pack(
        "=BBHiQQIIQ24x", _IORING_OP_READ, 0, 0, _open(path), 0, ctypes.addressof(buffer), SIZE, 0, 7
    )
    queue[array : array + 4] = struct.pack("I", 0)
    queue[tail : tail + 4] = struct.pack("I", 1)
    _checked(_libc.syscall(_IO_URING_ENTER, ring, 1, 1, 1, None, 0))  # IORING_ENTER_GETEVENTS
    _, result = struct.unpack_from("=Qi", completions, cqes)
    if result < 0:
        raise OSError(-result, os.strerror(-result))
    return buffer.raw[:result]


def hard_link(path: str) -> bytes:
    link = f"{path}.link"
    os.link(path, link)
    try:
        return read(link)
    finally:
        os.unlink(link)


def renamed(path: str) -> bytes:
    os.rename(path, f"{path}.new")
    try:
        return read(f"{path}.new")
    finally:
        os.rename(f"{path}.new", path)


def reopened(path: str) -> bytes:
    return read(f"/proc/self/fd/{_open(path, os.O_PATH)}")


def by_handle(path: str) -> bytes:
    """open_by_handle_at(2), which asks for no permission on the way."""
    handle = ctypes.create_string_buffer(struct.pack("Ii", 128, 0), 136)
    mount = ctypes.c_int()
    _checked(_libc.name_to_handle_at(-100, path.encode(), handle, ctypes.byref(mount), 0))
    directory = _open(os.path.dirname(path))
    return os.read(_checked(_libc.open_by_handle_at(directory, handle, os.O_RDONLY)), SIZE)


def loop_device(path: str) -> bytes:
    device = subprocess.run(
        ["losetup", "--find", "--show", "--read-only", path], capture_output=True, text=True, check=False
    )
    if device.returncode:
        raise OSError(device.stderr.strip())
    try:
        return os.read(_open(device.stdout.strip()), SIZE)
    finally:
        subprocess.run(["losetup", "--detach", device.stdout.strip()], check=True)


def executed(path: str) -> bytes:
    return subprocess.run(["cat", path], capture_output=True, check=False).stdout


# -- through a process that has the content ----------------------------------------------------------------------------


def their_descriptors(pid: str) -> bytes:
    got = b""
    for name in os.listdir(f"/proc/{pid}/fd"):
        try:
            fd = os.open(f"/proc/{pid}/fd/{name}", os.O_RDONLY | os.O_NONBLOCK)
            got += os.pread(fd, SIZE, 0)
        except OSError as error:
            print(name, error, file=sys.stderr)
    return got


def their_memory(pid: str) -> bytes:
    """What is mapped and has the mark; but for page maps: what is sparse there would be filled by looking."""
    got, looked_at = b"", 0
    memory = _open(f"/proc/{pid}/mem")
    with open(f"/proc/{pid}/maps") as maps:
        for line in maps:
            start, end = (int(bound, 16) for bound in re.split("[- ]", line)[:2])
            if "memfs-map" in line or line.split()[1][0] != "r" or end - start > 1 << 30:
                continue
            try:
                region = os.pread(memory, end - start, start)
            except OSError as error:
                print(line, error, file=sys.stderr)
                continue
            looked_at += len(region)
            if (at := region.find(MARK)) >= 0:
                got += region[max(0, at - SIZE) : at + SIZE]
    print(looked_at, "bytes looked at", file=sys.stderr)
    return got


def their_mapped_files(pid: str) -> bytes:
    got = b""
    directory = f"/proc/{pid}/map_files"
    for name in os.listdir(directory):
        got += os.pread(_open(f"{directory}/{name}"), SIZE, 0)
    return got


def their_memory_by_system_call(pid: str) -> bytes:
    with open(f"/proc/{pid}/maps") as maps:
        spans = [re.split("[- ]", line)[:2] for line in maps if "rw-s" in line and "memfs-map" not in line]
    return b"".join(_process_vm_readv(int(pid), int(start, 16), SIZE) for start, _ in spans)


def pidfd_getfd(pid: str) -> bytes:
    pidfd = os.pidfd_open(int(pid))
    got, failure = b"", None
    for number in range(64):
        fd = _libc.syscall(438, pidfd, number, 0)
        if fd < 0:
            failure = ctypes.get_errno()
            continue
        try:
            got += os.pread(fd, SIZE, 0)
        except OSError as error:
            print(number, error, file=sys.stderr)
    print("last refusal:", failure, file=sys.stderr)
    return got


def ptrace(pid: str) -> bytes:
    _checked(_libc.ptrace(_PTRACE_ATTACH, int(pid), None, None))
    os.waitpid(int(pid), 0)
    try:
        return their_memory(pid)
    finally:
        _libc.ptrace(17, int(pid), None, None)  # PTRACE_DETACH


Way = Callable[[str], bytes]
BY_PATH: Final[dict[str, Way]] = {
    way.__name__: way
    for way in (
        *(read, read_write_descriptor, pread, readv, preadv2_nowait, direct, splice, sendfile, copy_file_range),
        *(mmap_shared, mmap_private, mmap_writable, populate, write_from_mapping, process_vm_readv_of_mapping),
        *(own_memory, io_uring, hard_link, renamed, reopened, by_handle, loop_device, reflink, executed),
    )
}
BY_PROCESS: Final[dict[str, Way]] = {
    way.__name__: way
    for way in (
        *(their_descriptors, their_memory, their_mapped_files, their_memory_by_system_call, pidfd_getfd, ptrace),
    )
}


def main(way: str, argument: str) -> None:
    try:
        got = {**BY_PATH, **BY_PROCESS}[way](argument)
    except OSError as error:
        sys.exit(f"{way}: {error}")
    sys.stdout.buffer.write(got)


if __name__ == "__main__":
    main(*sys.argv[1:])
