"""Busy polling: the window follows what comes, within its bounds."""

from __future__ import annotations

import os

import pytest

from memfs.contract.aio.busy_poll import BusyPoll

MAXIMUM = 160e-6  # seconds


class Clock:
    """Seconds, at the test's will; a look takes a microsecond."""

    now = 1000.0

    def __call__(self) -> float:
        self.now += 1e-6
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def poll(clock: Clock) -> BusyPoll:
    return BusyPoll(MAXIMUM, clock=clock)


def wait(poll: BusyPoll, clock: Clock, seconds: float) -> tuple[int, bool]:
    """Wait for what comes so soon. Returns how often was looked, and whether it slept."""
    looks, slept = 0, False
    poll.start()
    comes = clock.now + seconds
    while clock.now < comes:
        looks += 1
        if not poll.goes_on():
            clock.now, slept = comes, True
    poll.stop()
    return looks, slept


def test_window_grows_until_it_catches_what_comes(poll: BusyPoll, clock: Clock) -> None:
    slept = [wait(poll, clock, 70e-6)[1] for _ in range(10)]
    assert slept == [True] * 3 + [False] * 7, "20, 40, 80 microseconds"
    assert poll.window == pytest.approx(80e-6), "it grows no further than it must"


def test_window_never_exceeds_the_maximum(poll: BusyPoll, clock: Clock) -> None:
    for microseconds in range(0, 160, 5):
        wait(poll, clock, microseconds * 1e-6)
        wait(poll, clock, 155e-6)
    assert poll.window == MAXIMUM


def test_polling_in_vain_ends(clock: Clock) -> None:
    poll = BusyPoll(MAXIMUM, window=MAXIMUM, clock=clock)
    looks = [wait(poll, clock, 1.0)[0] for _ in range(8)]
    assert looks == sorted(looks, reverse=True)
    assert (looks[0] > 100, looks[-1], poll.window) == (True, 1, 0.0)


def test_one_long_wait_does_not_undo_what_was_learnt(clock: Clock) -> None:
    poll = BusyPoll(MAXIMUM, window=MAXIMUM, clock=clock)
    wait(poll, clock, 1.0)
    assert not wait(poll, clock, 70e-6)[1]


def test_nothing_is_polled_for_that_nobody_waits_for(poll: BusyPoll) -> None:
    poll.window = MAXIMUM
    assert not poll.goes_on()
    poll.stop()
    assert poll.window == MAXIMUM


class OtherProcess:
    """A process that does what is waited for when it has the CPU; it needs ours if it `shares` that."""

    def __init__(self, *, shares: bool) -> None:
        self.shares = shares
        self.yields = 0
        self.is_done = False

    def sched_yield(self) -> None:
        self.yields += 1
        self.is_done = True

    def wait(self, poll: BusyPoll) -> bool:
        """Wait for it, and return whether the first look was in vain."""
        self.is_done = not self.shares
        poll.start()
        poll.yield_first()
        is_in_vain = not self.is_done
        while not self.is_done:
            assert poll.goes_on()
        poll.stop()
        return is_in_vain


@pytest.fixture
def other(monkeypatch: pytest.MonkeyPatch) -> OtherProcess:
    other = OtherProcess(shares=True)
    monkeypatch.setattr(os, "sched_yield", other.sched_yield)
    return other


def test_other_process_runs_before_a_look_that_would_be_in_vain(clock: Clock, other: OtherProcess) -> None:
    poll = BusyPoll(MAXIMUM, window=MAXIMUM, clock=clock)
    in_vain = sum(other.wait(poll) for _ in range(170))
    assert (in_vain, other.yields) == (10, 170)


def test_where_all_is_there_already_nothing_is_yielded_for_long(clock: Clock, other: OtherProcess) -> None:
    poll = BusyPoll(MAXIMUM, window=MAXIMUM, clock=clock)
    assert other.wait(poll)
    other.shares, other.yields = False, 0
    assert not any(other.wait(poll) for _ in range(1000))
    assert other.yields == 16


def test_nothing_is_yielded_where_polling_does_not_pay(clock: Clock, other: OtherProcess) -> None:
    poll = BusyPoll(MAXIMUM, window=0.0, clock=clock)
    for _ in range(10):
        poll.start()
        poll.yield_first()
        assert not poll.goes_on()
        clock.now += 1.0
        poll.stop()
    assert other.yields == 0


def test_window_gets_no_smaller_than_its_minimum(clock: Clock, other: OtherProcess) -> None:
    """What needs our CPU is there after one yield, however long it took when others had it."""
    poll = BusyPoll(MAXIMUM, window=MAXIMUM, minimum=20e-6, clock=clock)
    for _ in range(20):
        wait(poll, clock, 1.0)
    assert poll.window == 20e-6
    other.wait(poll)
    assert poll.window == 20e-6
