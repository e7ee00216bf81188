"""Polling for a short while before sleeping, for as long as experience says that it pays.

To sleep and be woken takes longer than many an answer does, above all on another CPU, which goes idle meanwhile. To
poll in vain costs the whole of a CPU. So the window, for which is polled before sleeping, follows what comes, as KVM's
halt_poll_ns does when a vCPU halts (virt/kvm/kvm_main.c, kvm_vcpu_halt; Documentation/virt/kvm/halt-polling.rst): it
grows when something came soon after sleeping began, so that a larger window would have caught it, and shrinks when it
took longer than any window may be and than it takes to sleep and be woken (which is included in what is measured).

    poll.start()
    poll.yield_first()
    while not (ready := look()):
        if not poll.goes_on():
            await sleep()
    poll.stop()

To look in vain takes longer than to yield the CPU. So where a first look was in vain, which it always is while the
other process needs our CPU for it, other processes run before the next first looks.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from typing import Final

_FACTOR: Final = 2  # halt_poll_ns_grow and halt_poll_ns_shrink
_SMALLEST: Final = 20e-6  # seconds; halt_poll_ns_grow_start is 10 us, but we are slower
_WAKE_UP: Final = 300e-6  # seconds that it may take both processes to be woken
_YIELDS: Final = 16  # before as many first looks; then one without, to see whether that is in vain


class BusyPoll:
    """How long to poll before sleeping, in seconds of `clock`: at first `window`, which must not exceed `maximum`.

    It gets no smaller than `minimum`, where what is waited for needs our CPU and yielding is worth it in any case.

    >>> now = 0.0
    >>> poll = BusyPoll(100e-6, clock=lambda: now)
    >>> for waited in (50e-6, 50e-6, 50e-6, 5.0):
    ...     poll.start()
    ...     look_again = poll.goes_on()
    ...     now += waited
    ...     poll.stop()
    ...     print(f"{poll.window * 1e6:.0f}")
    20
    40
    80
    40
    """

    __slots__ = ("_clock", "_end", "_is_waiting", "_since", "_yields", "maximum", "minimum", "window")

    def __init__(
        self,
        maximum: float,
        *,
        window: float = 0.0,
        minimum: float = 0.0,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self.maximum: Final = maximum
        self.minimum: Final = minimum
        self.window = window
        self._clock: Final = clock
        self._is_waiting = False
        self._since: float | None = None  # of the first look that was in vain; None: there was none yet
        self._end = 0.0
        self._yields = 0  # before how many first looks from now on

    def start(self) -> None:
        """Wait for something from now on. To find it at the first look costs not even a look at the clock."""
        self._is_waiting, self._since = True, None

    def yield_first(self) -> None:
        """Have other processes run before the first look, where that is in vain otherwise."""
        if self._yields and self._is_waiting and self._since is None:
            self._yields -= 1
            os.sched_yield()

    def goes_on(self) -> bool:
        """Return whether to look once more rather than to sleep; other processes have had the CPU meanwhile."""
        if not self._is_waiting:
            return False
        now = self._clock()
        if self._since is None:
            self._since, self._end = now, now + self.window
        if now >= self._end:
            return False
        self._yields = _YIELDS
        os.sched_yield()
        return True

    def stop(self) -> None:
        """Adapt the window: it has come. Without effect if it was not waited for, or not in vain."""
        self._is_waiting = False
        if self._since is None:
            return
        waited, self._since = self._clock() - self._since, None
        if waited <= self.window:
            return
        if waited < self.maximum + _WAKE_UP:
            self.window = min(max(self.window * _FACTOR, _SMALLEST), self.maximum)
        else:
            shorter = self.window / _FACTOR
            self.window = shorter if shorter >= _SMALLEST else self.minimum
