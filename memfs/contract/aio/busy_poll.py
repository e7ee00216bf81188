"""Polling for a short while before sleeping, for as long as experience says that it pays.

To sleep and be woken takes longer than many an answer does, above all on another CPU, which goes idle meanwhile. To
poll in vain costs the whole of a CPU. So the window, for which is polled before sleeping, follows what comes, as KVM's
halt_poll_ns does when a vCPU halts (virt/kvm/kvm_main.c, kvm_vcpu_halt; Documentation/virt/kvm/halt-polling.rst): it
grows when something came soon after sleeping began, so that a larger window would have caught it, and shrinks when it
took longer than any window may be and than it takes to sleep and be woken (which is included in what is measured).

    poll.start()
    while not (ready := look()):
        if not poll.goes_on():
            await sleep()
    poll.stop()
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from typing import Final

_FACTOR: Final = 2  # halt_poll_ns_grow and halt_poll_ns_shrink
_SMALLEST: Final = 20e-6  # seconds; halt_poll_ns_grow_start is 10 us, but we are slower
_WAKE_UP: Final = 300e-6  # seconds that it may take both processes to be woken


class BusyPoll:
    """How long to poll before sleeping, in seconds of `clock`: between 0 and `maximum`, at first `window`.

    >>> now = 0.0
    >>> poll = BusyPoll(100e-6, clock=lambda: now)
    >>> for waited in (50e-6, 50e-6, 50e-6, 5.0):
    ...     poll.start()
    ...     now += waited
    ...     poll.stop()
    ...     print(f"{poll.window * 1e6:.0f}")
    20
    40
    80
    40
    """

    __slots__ = ("_clock", "_end", "_since", "maximum", "window")

    def __init__(self, maximum: float, *, window: float = 0.0, clock: Callable[[], float] = time.perf_counter) -> None:
        self.maximum: Final = maximum
        self.window = window
        self._clock: Final = clock
        self._since: float | None = None  # None: nothing is waited for
        self._end = 0.0

    def start(self) -> None:
        """Wait for something from now on."""
        self._since = self._clock()
        self._end = self._since + self.window

    def goes_on(self) -> bool:
        """Return whether to look once more rather than to sleep; other processes have had the CPU meanwhile."""
        if self._since is None or self._clock() >= self._end:
            return False
        os.sched_yield()
        return True

    def stop(self) -> None:
        """Adapt the window: it has come. Without effect if nothing was waited for."""
        if self._since is None:
            return
        waited, self._since = self._clock() - self._since, None
        if waited <= self.window:
            return
        if waited < self.maximum + _WAKE_UP:
            self.window = min(max(self.window * _FACTOR, _SMALLEST), self.maximum)
        else:
            shorter = self.window / _FACTOR
            self.window = shorter if shorter >= _SMALLEST else 0.0
