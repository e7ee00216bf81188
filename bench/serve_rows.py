"""What it costs to make KVM's ioctls over a socket, in another process, beside an echo and beside the real KVM's."""

from __future__ import annotations

import contextlib
import fcntl
import os
import socket
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Final

from bench.harness import BenchError, Row, Run, alone, compare, measure, memfs, now
from kvmsim import ioctls
from kvmsim.client import Kvm, Vcpu, Vm
from kvmsim.uapi import KVM_MEM_FD

_WHERE: Final = "two processes"
_CALLS: Final = 2000
_EXITS: Final = 400
_VMMS: Final = 100
_SIZE: Final = 1 << 20
_NOWHERE: Final = _SIZE  # a gpa of no slot


def rows(run: Run) -> Iterator[Row]:
    """All rows about the service."""
    if not run.wants("serve"):
        return
    with tempfile.TemporaryDirectory(prefix="memfs-bench-serve-") as directory, memfs(run, "size=256m") as mounted:
        path = f"{directory}/kvm.sock"
        with _service(path, mounted.path), Kvm(path) as kvm, _echo() as echo:
            yield from _round_trips(run, kvm, echo)
            with kvm.create_vm() as vm, vm.create_vcpu(0) as vcpu, _slot(vm, mounted.path):
                yield from _exits(run, vm, vcpu)
            sample = measure({"vmms": lambda: _many(path, mounted.path)}, min(run.repetitions, 3))["vmms"]
            yield alone(f"serve: {_VMMS} VMMs, each a VM with a slot, a vCPU and a run", _WHERE, sample, "ms")


@contextlib.contextmanager
def _service(path: str, directory: Path) -> Iterator[None]:
    command = [sys.executable, "-m", "kvmsim", "serve", "--socket", path, "--memfs", str(directory)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            if not process.stdout.readline():
                raise BenchError("kvmsim serve does not start")
            yield
        finally:
            process.terminate()


@contextlib.contextmanager
def _echo() -> Iterator[socket.socket]:
    """Give a socket at whose other end a thread sends back what comes."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)

    def serve() -> None:
        while data := theirs.recv(64):
            theirs.send(data)

    thread = threading.Thread(target=serve, daemon=True)
    thread.start()
    with ours, theirs:
        yield ours
        ours.shutdown(socket.SHUT_RDWR)
        thread.join()


def _round_trips(run: Run, kvm: Kvm, echo: socket.socket) -> Iterator[Row]:
    count = run.count(_CALLS)

    def ours() -> float:
        started = now()
        for _ in range(count):
            kvm.ioctl(ioctls.KVM_GET_API_VERSION)
        return (now() - started) / count * 1e6

    def echoed() -> float:
        started = now()
        for _ in range(count):
            echo.send(b"x" * 16)
            echo.recv(64)
        return (now() - started) / count * 1e6

    found = measure({"ours": ours, "echo": echoed}, run.repetitions)
    name = "serve: an ioctl beside an echo"
    yield compare(name, _WHERE, found["ours"], "us", "an echo by a thread", found["echo"])
    with contextlib.suppress(OSError):
        fd = os.open("/dev/kvm", os.O_RDWR | os.O_CLOEXEC)

        def real() -> float:
            started = now()
            for _ in range(count):
                fcntl.ioctl(fd, ioctls.KVM_GET_API_VERSION)
            return (now() - started) / count * 1e6

        try:
            found = measure({"ours": ours, "real": real}, run.repetitions)
        finally:
            os.close(fd)
        name = "serve: an ioctl beside the real KVM's"
        yield compare(name, _WHERE, found["ours"], "us", "an ioctl of the real KVM", found["real"])


@contextlib.contextmanager
def _slot(vm: Vm, directory: Path) -> Iterator[None]:
    """Give a VM a slot of shared memory and of a guest_memfd."""
    name = directory / f"shared-{os.urandom(8).hex()}"
    shared = os.open(name, os.O_RDWR | os.O_CREAT, 0o600)
    try:
        os.ftruncate(shared, _SIZE)
        private = vm.create_guest_memfd(_SIZE)
        try:
            vm.set_user_memory_region(0, KVM_MEM_FD, gpa=0, size=_SIZE, fd=shared, private_fd=private)
        finally:
            os.close(private)
        yield
    finally:
        os.close(shared)
        name.unlink()


def _exits(run: Run, vm: Vm, vcpu: Vcpu) -> Iterator[Row]:
    count = run.count(_EXITS)

    def exits() -> float:
        vcpu.set_accesses([(_NOWHERE, ioctls.ACCESS_STORE, 1, 0)] * count)
        started = now()
        for _ in range(count):
            vcpu.run()
        return count / (now() - started)

    def conversions() -> float:
        pages = run.count(_EXITS) // 4
        started = now()
        for page in range(pages):
            vm.set_memory_attributes(page % 128 * 4096, 4096, ioctls.KVM_MEMORY_ATTRIBUTE_PRIVATE)
            vm.set_memory_attributes(page % 128 * 4096, 4096, 0)
        return (now() - started) / pages / 2 * 1e6

    found = measure({"exits": exits, "conversions": conversions}, run.repetitions)
    yield alone("serve: MMIO exits", _WHERE, found["exits"], "1/s")
    yield alone("serve: KVM_SET_MEMORY_ATTRIBUTES of a page", _WHERE, found["conversions"], "us")


def _many(path: str, directory: Path) -> float:
    """Return how many milliseconds a hundred VMMs take together, from the first connection to the last end."""
    started = now()
    with contextlib.ExitStack() as opened:
        for _ in range(_VMMS):
            vm = opened.enter_context(opened.enter_context(Kvm(path)).create_vm())
            vcpu = opened.enter_context(vm.create_vcpu(0))
            opened.enter_context(_slot(vm, directory))
            vcpu.set_accesses([(vm.shared_bit, ioctls.ACCESS_STORE, 1, 1)])
            vcpu.run()
    return (now() - started) * 1e3
