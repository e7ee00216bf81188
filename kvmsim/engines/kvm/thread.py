"""The thread in which a vCPU runs: KVM_RUN, again and again, each time that it is told to.

A vCPU of the real KVM belongs to one thread. Between it and the event loop there is an eventfd in each direction, so
that what the event loop waits for can be cancelled, and is still there afterwards. Rejected: trio.to_thread for each
KVM_RUN, which takes twice as long, and cannot be cancelled.

It is out, or in KVM_RUN; and in there it executes, or it is parked: asleep in the kernel, at a page that is not there.
To get it out there are KVM's immediate_exit and a signal. A signal for one that is parked may not get it out, but have
it ask for the page again and again, at full speed; one that is parked executes nothing, so it is left alone.
"""

from __future__ import annotations

import contextlib
import errno
import os
import signal
import threading
from collections.abc import Callable
from typing import Final

from kvmsim.engines.kvm.uapi import KvmVcpu
from kvmsim.uapi import KVM_EXIT_IO

#: What gets a thread out of KVM_RUN
KICK: Final = signal.SIGRTMIN + 1

#: What is on the I/O bus, called in the vCPU's thread with port, size and what `out` writes, or None for `in`. It
#: returns what `in` reads, or anything for `out`; None: the VMM is to answer
Bus = Callable[[int, int, bytes | None], bytes | None]


def handle_kicks() -> None:
    """Have the signal that kicks vCPUs do nothing else. From the main thread. Raises ValueError in another one.

    It must not be ignored, since the kernel would then not deliver it.
    """
    if signal.getsignal(KICK) is not _ignore_kick:
        signal.signal(KICK, _ignore_kick)


def _ignore_kick(*_: object) -> None:
    pass


class VcpuThread:
    """A vCPU's thread, which waits to be told to enter. `bus`: what answers `in` and `out` in it, if anything does."""

    def __init__(self, vcpu: KvmVcpu, name: str, bus: Bus) -> None:
        self._vcpu: Final = vcpu
        self._bus: Final = bus
        self._go: Final = os.eventfd(0, os.EFD_CLOEXEC)
        #: readable when it is out, or somebody else has said that something happened
        self.happened: Final = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self._ending = False
        self.is_out = True
        self.result = 0  #: once it is out: 0, or the errno of KVM_RUN
        self.failure: BaseException | None = None  #: what a port raised
        self._thread: Final = threading.Thread(target=self._main, name=name, daemon=True)
        self._started: Final = threading.Event()
        self.id = 0  #: native
        self._thread.start()
        self._started.wait()

    def _main(self) -> None:
        self.id = threading.get_native_id()
        self._started.set()
        while True:
            os.eventfd_read(self._go)
            if self._ending:
                return
            try:
                self.result = self._run()
            except BaseException as error:
                self.failure = error
            self.is_out = True
            self.notify()

    def _run(self) -> int:
        while True:
            try:
                self._vcpu.run()
            except OSError as error:
                return error.errno or errno.EINVAL
            if not self._answer():
                return 0

    def _answer(self) -> bool:
        """Answer an access to a port. Returns False if it was none, or is for the VMM."""
        if self._vcpu.exit_reason != KVM_EXIT_IO:
            return False
        is_write, port, size, where = self._vcpu.io
        answer = self._bus(port, size, self._vcpu.page[where] if is_write else None)
        if answer is not None and not is_write:
            length = where.stop - where.start
            self._vcpu.page[where] = answer[:length].ljust(length, b"\xff")
        return answer is not None

    def enter(self) -> None:
        """Have it enter KVM_RUN. It must be out."""
        assert self.is_out
        self._vcpu.immediate_exit = False
        self.is_out = False
        os.eventfd_write(self._go, 1)

    def kick(self) -> None:
        """Have it leave KVM_RUN soon, with EINTR, if it executes."""
        self._vcpu.immediate_exit = True
        signal.pthread_kill(self._thread.ident or 0, KICK)

    def notify(self) -> None:
        """Make `happened` readable."""
        os.eventfd_write(self.happened, 1)

    def take_notice(self) -> None:
        """Make `happened` unreadable."""
        with contextlib.suppress(BlockingIOError):
            os.eventfd_read(self.happened)

    def close(self) -> None:
        """End it. It must be out, or what it is parked at must be gone."""
        self._ending = True
        if not self.is_out:
            self.kick()
        os.eventfd_write(self._go, 1)
        self._thread.join()
        os.close(self._go)
        os.close(self.happened)
