"""How long another user's stat(2) takes while one user floods memfs with what costs it most.

Each flood is a process with many threads that ask for the same without end, of a file, a directory or an inode which
that user has filled. Measured is the 99th percentile of the other's stat(2), in milliseconds; the reference is the same
with nobody else. The process that asks and the daemon share a CPU, or do not; the flood may run on both.
"""

from __future__ import annotations

import contextlib
import os
import statistics
import subprocess
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Final

from bench.harness import BenchError, Row, Run, compare, measure, memfs, now, placements

_TARGET: Final = 5.0  # ms, on a quiet machine
_STATS: Final = 1000
_THREADS: Final = 16  # that flood
_USER: Final = 65534  # that floods
_OPTIONS: Final = "size=3g,nr_inodes=100k,allow_other,socket_mode=0666"
_OTHERWISE: Final = {"writes of 1 MiB to the daemon": ",passthrough=off"}

#: A program that floods: what it fills first, and what its threads then call without end
_PROGRAM: Final = """
import os, sys, threading
os.chdir(sys.argv[1])
{prepare}
def flood():
    try:
        while True:
            {call}
    except Exception as error:
        print(error, file=sys.stderr, flush=True)
        os._exit(1)
os.sched_setaffinity(0, range(os.cpu_count()))
os.setresgid({user}, {user}, {user})
os.setresuid({user}, {user}, {user})
for _ in range({threads}):
    threading.Thread(target=flood, daemon=True).start()
print("flooding", flush=True)
sys.stdin.read()
os._exit(0)
"""

#: What a flood of the socket begins with: the working directory has it, by a name that any user reaches
_SOCKET: Final = """
import socket
name = os.path.basename(os.getcwd()) + ".sock"
os.chmod("..", 0o711)
"""
_HELD: Final = 1024  # connections, all that one user may have
_REFUSED: Final = f"""
from memfs.contract.protocol.connection import Connection, Role
from memfs.contract.protocol.messages import VERSION, Hello
os.chdir("..")
held, room = [], threading.Semaphore({_HELD})
def connect():
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    sock.connect(name)
    return sock
def be_refused():
    if room.acquire(blocking=False):
        held.append(connect())
        held[-1].send(Connection(Role.OWNER).send(Hello(VERSION, VERSION, "flood"))[1])
        held[-1].recv(100)
    else:
        with connect() as refused:
            assert not refused.recv(100)
"""
_FRAGMENTED: Final = f"""
import itertools, trio
from memfs.contract.protocol import connect
from memfs.contract.units import PageIndex, PageRange
pages, numbers = PageRange(PageIndex(0), PageIndex(8192)), itertools.count()
files = [os.open(f"fragmented{{number}}", os.O_RDWR | os.O_CREAT) for number in range({_THREADS})]
for file in files:
    for page in range(1, 8192, 2): os.pwrite(file, b"x", page * 4096)
os.chdir("..")
async def hear(message): pass
async def ask(client, file):
    while True: await client.get_pfn(file, pages, alloc=False)
async def flood_socket():
    async with connect(name, "flood", hear) as client, trio.open_nursery() as nursery:
        registered, _ = await client.register(files[next(numbers)])
        for _ in range(16): nursery.start_soon(ask, client, registered.file)
"""

#: Owns files: `owning` is called by each thread, of which one is the owner, and says which number a thread has
_OWNED: Final = """
import itertools, resource, trio
from memfs.contract.protocol import connect
resource.setrlimit(resource.RLIMIT_NOFILE, (4096, 4096))
mount, numbers, owned = os.getcwd(), itertools.count(), threading.Event()
files = [os.open(f"owned{number}", os.O_RDWR | os.O_CREAT) for number in range(many)]
os.chdir("..")
async def hear(message): await trio.sleep(1)
async def own():
    async with connect(name, "flood", hear) as client:
        for file in files: await client.register(file)
        owned.set()
        await trio.sleep_forever()
def owning():
    number = next(numbers)
    if number == 0: trio.run(own)
    owned.wait()
    return number
"""
_TRUNCATED: Final = """
def truncate():
    fd = files[owning()]
    while True:
        os.posix_fallocate(fd, 0, 4096)
        os.ftruncate(fd, 0)
"""
_DESCRIBED: Final = """
def describe():
    owning()
    while True: os.getxattr(mount, "user.memfs.stat")
"""
_CONVERTED: Final = """
from memfs.contract.conversion import convert, key_of
from memfs.contract.units import PageIndex, PageRange
os.chmod(".", 0o777)
ranges = [PageRange(PageIndex(page), PageIndex(page + 1)) for page in range(0, 1000, 2)]
def convert_pages():
    name = str(threading.get_ident())
    shared = os.open(name, os.O_RDWR | os.O_CREAT)
    os.mknod(name + "p", 0o600)
    os.setxattr(name + "p", "user.memfs.seals", b"guest")
    private = os.open(name + "p", os.O_RDWR)
    for fd in shared, private: os.ftruncate(fd, 8 << 20)
    while True:
        for to_private in True, False: convert(private, key_of(shared), ranges, to_private=to_private)
"""

_FLOODS: Final = {
    "setxattr with 5,000 set": (
        "open('file', 'w').close(); os.chmod('file', 0o666)\n"
        "for number in range(5000): os.setxattr('file', f'user.{number}', b'')",
        "os.setxattr('file', 'user.1', b'1')",
    ),
    "getxattr user.memfs.stat": ("", "os.getxattr('.', 'user.memfs.stat')"),
    "SEEK_HOLE in 700 MiB": (
        "fd = os.open('large', os.O_RDWR | os.O_CREAT); os.posix_fallocate(fd, 0, 700 << 20)\n"
        "for number in range(700): os.pwrite(fd, bytes(1 << 20), number << 20)",
        "os.lseek(fd, 0, os.SEEK_HOLE)",
    ),
    "listing 20,000 names": (
        "os.mkdir('names')\nfor number in range(20000): os.mkfifo(f'names/{number}')",
        "sum(1 for _ in os.scandir('names'))",
    ),
    "statfs and removing 64 MiB": (
        "os.chmod('.', 0o777)",
        "name = str(threading.get_ident()); fd = os.open(name, os.O_RDWR | os.O_CREAT); "
        "os.posix_fallocate(fd, 0, 64 << 20); os.close(fd); os.unlink(name); os.statvfs('.')",
    ),
    "truncating 64 MiB past the end": (
        "os.chmod('.', 0o777)\nfrom memfs.contract.sys.libc import FALLOC_FL_KEEP_SIZE, fallocate",
        "fd = os.open(str(threading.get_ident()), os.O_RDWR | os.O_CREAT); "
        "fallocate(fd, FALLOC_FL_KEEP_SIZE, 0, 64 << 20); os.ftruncate(fd, 0); os.close(fd)",
    ),
    "writes of 1 MiB to the daemon": (
        "import mmap\nos.chmod('.', 0o777)\ncontent = mmap.mmap(-1, 1 << 20)",
        "fd = os.open(str(threading.get_ident()), os.O_RDWR | os.O_CREAT | os.O_DIRECT)\n"
        "            while True: os.pwrite(fd, content, 0)",
    ),
    "truncations whose owner is slow": (f"many = {_THREADS}" + _SOCKET + _OWNED + _TRUNCATED, "truncate()"),
    "getxattr user.memfs.stat, 1,500 owned": ("many = 1500" + _SOCKET + _OWNED + _DESCRIBED, "describe()"),
    "conversions of 500 ranges": (_CONVERTED, "convert_pages()"),
    "GetPfn of 8,192 pages, half of them there": (_SOCKET + _FRAGMENTED, "trio.run(flood_socket)"),
    "connections that are refused": (_SOCKET + _REFUSED, "be_refused()"),
}


def rows(run: Run) -> Iterator[Row]:
    """Measure each flood, for each placement."""
    for name, (prepare, call) in _FLOODS.items():
        title = f"another user's stat p99, {name}"
        if not run.wants(title):
            continue
        for placement, (cpu, daemon_cpu) in placements().items():
            with memfs(run, _OPTIONS + _OTHERWISE.get(name, "")) as ours:
                ours.pin(daemon_cpu)
                small = ours.path / "small"
                small.write_bytes(b"x")  # so that memfs is asked each time
                asking = partial(_p99, small, run.count(_STATS))
                with _on(cpu):
                    quiet = measure({"nobody": asking}, run.repetitions)["nobody"]
                    with _flood(ours.path, prepare, call):
                        flooded = measure({"flood": asking}, run.repetitions)["flood"]
            yield compare(title, placement, flooded, "ms", "nobody else", quiet, at_most=_TARGET)


def _p99(path: Path, count: int) -> float:
    """Return the 99th percentile of the milliseconds that stat(2) takes."""
    taken = []
    for _ in range(count):
        started = now()
        os.stat(path)
        taken.append(now() - started)
    return statistics.quantiles(taken, n=100)[-1] * 1e3


@contextlib.contextmanager
def _on(cpu: int) -> Iterator[None]:
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {cpu})
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)


@contextlib.contextmanager
def _flood(path: Path, prepare: str, call: str) -> Iterator[None]:
    program = _PROGRAM.format(prepare=prepare, call=call, user=_USER, threads=_THREADS)
    command = [sys.executable, "-c", program, str(path)]
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parent.parent)}
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        if process.stdout.readline() != b"flooding\n":
            raise BenchError("the flood has not begun")
        yield
        if process.poll() is not None:
            raise BenchError(f"the flood has ended: {call}")
        process.stdin.close()
        process.wait()
