"""Fault injection for tests: named points where memfs, or kvmsim, can be made to fail, to wait or to die.

Off in production: it is on only for a process whose environment has MEMFS_INJECT, the name of a file. A test arms one
point at a time by writing "POINT KIND" to that file, or "POINT KIND N" to spare it N times; the process that comes to
the point first removes the file and does it:

    fail    OSError(EIO)
    delay   wait for DELAY seconds
    kill    SIGKILL to itself

The code that is tested knows nothing of this. A program that can be tested so has a table of **steps**, methods with
points before and after them (memfs/fault_points.py, kvmsim/fault_points.py), and `install` wraps the methods when the
program starts. What failing means there is decided by the caller of the step, as for any other error.

Rejected: calls at the points themselves (they hide the order of steps, which is what matters in that code).
"""

from __future__ import annotations

import enum
import errno
import functools
import importlib
import inspect
import os
import signal
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Final

import trio

DELAY: Final = 0.05  #: seconds
_FILE: Final = os.environ.get("MEMFS_INJECT")


class Point(enum.Enum):
    """A moment between two steps."""

    BEFORE_BEGIN = "before-begin"
    AFTER_BEGIN = "after-begin"
    BEFORE_FREE = "before-free"
    AFTER_FREE = "after-free"
    BEFORE_ALLOCATE = "before-allocate"
    AFTER_ALLOCATE = "after-allocate"
    BEFORE_ACCOUNT = "before-account"
    AFTER_ACCOUNT = "after-account"
    BEFORE_END = "before-end"
    AFTER_END = "after-end"
    BEFORE_TELL = "before-tell"  # that pages have come
    AFTER_TELL = "after-tell"
    BEFORE_SEND = "before-send"
    AFTER_SEND = "after-send"
    BEFORE_RECEIVE = "before-receive"
    AFTER_RECEIVE = "after-receive"
    BEFORE_COMMIT = "before-commit"
    AFTER_COMMIT = "after-commit"


class Kind(enum.Enum):
    """What happens at a point."""

    FAIL = "fail"
    DELAY = "delay"
    KILL = "kill"


#: points, or a function that says which from the arguments of the step
Points = Iterable[Point] | Callable[..., Iterable[Point]]


@dataclass(frozen=True)
class Step:
    """A method, and the points before and after it; those after it are reached only if it succeeds.

    Other tasks may come in between at the points of an async method. At those of an ordinary method a delay holds up
    everybody, as if the process did not get a CPU.
    """

    before: Points = ()
    after: Points = ()
    always: bool = False  #: it runs even if a point before it fails, for it records what has happened


def install(steps: Mapping[str, Step]) -> None:
    """Wrap methods, named "package.module:Class.method", if MEMFS_INJECT is set.

    Raises AttributeError for a method that does not exist.
    """
    if _FILE is None:
        return
    for name, step in steps.items():
        module, _, path = name.partition(":")
        class_name, _, method = path.partition(".")
        owner = getattr(importlib.import_module(module), class_name)
        function = getattr(owner, method)
        wrap = _wrap_async if inspect.iscoroutinefunction(function) else _wrap
        setattr(owner, method, wrap(function, step))


def _wrap_async(function: Callable[..., Any], step: Step) -> Callable[..., Any]:
    @functools.wraps(function)
    async def wrapped(*args: Any, **kwargs: Any) -> Any:
        async def reach(points: Points) -> None:
            for point in _points(points, args, kwargs):
                if _is_delayed(point):
                    await trio.sleep(DELAY)

        try:
            await reach(step.before)
        except OSError:
            if step.always:
                await function(*args, **kwargs)
            raise
        result = await function(*args, **kwargs)
        await reach(step.after)
        return result

    return wrapped


def _wrap(function: Callable[..., Any], step: Step) -> Callable[..., Any]:
    @functools.wraps(function)
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        def reach(points: Points) -> None:
            for point in _points(points, args, kwargs):
                if _is_delayed(point):
                    time.sleep(DELAY)

        try:
            reach(step.before)
        except OSError:
            if step.always:
                function(*args, **kwargs)
            raise
        result = function(*args, **kwargs)
        reach(step.after)
        return result

    return wrapped


def _points(points: Points, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Iterable[Point]:
    return points(*args, **kwargs) if callable(points) else points


def _is_delayed(point: Point) -> bool:
    """Do what is armed for a point: return whether to wait there, raise OSError(EIO), or die."""
    assert _FILE is not None
    try:
        with open(_FILE) as file:
            name, kind, *spared = file.read().split()
        if name != point.value:
            return False
        if spared and (times := int(spared[0])):
            with open(_FILE, "w") as file:
                file.write(f"{name} {kind} {times - 1}")
            return False
        os.unlink(_FILE)
    except (FileNotFoundError, ValueError):  # nothing is armed, or it is being written
        return False
    match Kind(kind):
        case Kind.FAIL:
            raise OSError(errno.EIO, f"injected: {name}")
        case Kind.KILL:
            os.kill(os.getpid(), signal.SIGKILL)
    return True
