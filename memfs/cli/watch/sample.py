"""What memfs's did between two looks at their states: rates and latencies, for `memfs top` and `memfs web`."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from time import monotonic
from typing import Any, Final

from memfs.cli.states import Asking, mountpoints, state_at
from memfs.cli.timed_call import NO_ANSWER
from memfs.cli.watch.names import Names

SIDES: Final = ("private", "shared")
_ENDLESS: Final = 3600.0  # seconds, in the place of the bound of the last bucket, which JSON has no word for


@dataclass(frozen=True, slots=True)
class Latency:
    """How long owners took to acknowledge, in seconds; of the buckets of a histogram, so as finely as those go."""

    count: int
    p50: float
    p99: float
    longest: float
    buckets: list[tuple[float, int]]  #: how many took no longer than so many seconds, and longer than the one before


@dataclass(frozen=True, slots=True)
class Sample:
    """A mount at one moment. Rates are since the sample before; None in the first."""

    mountpoint: str
    state: dict[str, Any] | None = None
    why_not: str = NO_ANSWER
    at: float = 0.0  #: monotonic seconds
    conversions: dict[str, float] | None = None  #: calls a second, by the side that memory comes to
    pages: dict[str, float] | None = None  #: likewise
    latency: Latency | None = None
    paths: dict[int, str] = field(default_factory=dict)  #: of files with an owner, by inode number

    @property
    def owners(self) -> list[dict[str, Any]]:
        """The owners that we may see (docs/stat.schema.json)."""
        found: list[dict[str, Any]] = (self.state or {}).get("registry") or []
        return found

    @property
    def oldest_pending(self) -> float:
        """For how long the oldest notification has been pending that we may see, in seconds; 0: there is none."""
        return max((oldest(owner) for owner in self.owners), default=0.0)


def oldest(owner: Mapping[str, Any]) -> float:
    """Return for how long an owner has owed an acknowledgement, in seconds; 0: it owes none."""
    return max((float(each["age"]) for each in owner["pending"]), default=0.0)


def name_of(sample: Sample, ino: int) -> str:
    """Return the name of a file, from the mountpoint on; its number if it has no name that we know."""
    path = sample.paths.get(ino)
    return f"inode {ino}" if path is None else os.path.relpath(path, sample.mountpoint)


class Watcher:
    """Looks at mounts, again and again; those that do not answer are not waited for twice. `paths`: default: all."""

    def __init__(self, paths: Sequence[str] = ()) -> None:
        self._paths: Final = paths
        self._asking: Final = Asking(lambda path: _Mount(path).look)

    def look(self) -> list[Sample]:
        """Return what each mount says, after a few seconds at most."""
        answers = self._asking.ask(self._paths or mountpoints())
        return [each.said or Sample(each.mountpoint, why_not=each.why_not) for each in answers]


class _Mount:
    def __init__(self, mountpoint: str) -> None:
        self._mountpoint: Final = mountpoint
        self._names: Final = Names(mountpoint)
        self._before: Sample | None = None

    def look(self) -> Sample:
        """Return what it says. Blocking. Raises OSError, CommandError."""
        sample = Sample(self._mountpoint, state_at(self._mountpoint), "", monotonic())
        paths = self._names.look({each["ino"] for owner in sample.owners for each in owner["files"]})
        self._before = replace(sample, **rates(self._before, sample), paths=paths)
        return self._before


def rates(before: Sample | None, now: Sample) -> dict[str, Any]:
    """Return the fields of `Sample` that two make known; none if the daemon has begun to count anew."""
    if before is None or before.state is None or now.state is None or now.at <= before.at:
        return {}
    if any(before.state.get(name) != now.state.get(name) for name in ("generation", "pid")):
        return {}
    states = (before.state, now.state)
    if any(state.get(name) is None for state in states for name in ("conversions", "notifications")):
        return {}  # of another version
    seconds = now.at - before.at
    old, new = before.state["conversions"], now.state["conversions"]
    return {
        "conversions": {side: (new[side]["count"] - old[side]["count"]) / seconds for side in SIDES},
        "pages": {side: (new[side]["pages"] - old[side]["pages"]) / seconds for side in SIDES},
        "latency": latency(before.state["notifications"], now.state["notifications"]),
    }


def latency(before: Mapping[str, Any], now: Mapping[str, Any]) -> Latency | None:
    """Return how long owners took between two states, from their `notifications`; None if nothing was acknowledged."""
    longest, counts = 0.0, dict[float, int]()
    for kind, tally in now.items():
        old = before.get(kind, {"buckets": {}, "count": 0})
        last = 0
        for bound, value in [*tally["buckets"].items(), ("inf", tally["count"])]:
            total = value - (old["count"] if bound == "inf" else old["buckets"].get(bound, 0))
            if total > last:
                counts[float(bound)] = counts.get(float(bound), 0) + total - last
                longest = max(longest, min(float(bound), tally["longest"]))
            last = total
    if not counts:
        return None
    in_order = sorted(counts.items())
    p50, p99 = (min(_quantile(in_order, share), longest) for share in (0.5, 0.99))
    buckets = [(min(bound, _ENDLESS), count) for bound, count in in_order]
    return Latency(sum(counts.values()), p50, p99, longest, buckets)


def _quantile(buckets: Sequence[tuple[float, int]], share: float) -> float:
    """Return the bound of the bucket in which a share of all lies."""
    left = share * sum(count for _, count in buckets)
    for bound, count in buckets:
        left -= count
        if left <= 0:
            return bound
    return buckets[-1][0]


def pairs(owner: Mapping[str, Any]) -> Iterator[list[dict[str, Any]]]:
    """Return the files of an owner that are one memory: each guest-sealed one with an ordinary one of its size.

    What is left over is by itself.
    """
    ordinary = [each for each in owner["files"] if not each["guest"]]
    for private in (each for each in owner["files"] if each["guest"]):
        shared = next((each for each in ordinary if each["size"] == private["size"]), None)
        if shared is not None:
            ordinary.remove(shared)
        yield [private] if shared is None else [shared, private]
    yield from ([each] for each in ordinary)
