"""Whether a process dies is said as soon as it cannot be stopped any more. With real ones."""

from __future__ import annotations

import io
import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from memfs.owners.liveness import is_dying, is_stopped
from tests.helpers import until

THREADED = """
import threading, time
threading.Thread(target=time.sleep, args=(600,), daemon=True).start()
print("ready", flush=True)
time.sleep(600)
"""


@pytest.fixture
def child() -> Iterator[subprocess.Popen[str]]:
    """A process of two threads that does nothing."""
    process = subprocess.Popen([sys.executable, "-Ic", THREADED], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    with process.stdout:
        assert process.stdout.readline() == "ready\n"
        yield process
        process.kill()
        process.wait()


def state(pid: int) -> str:
    """A process's state, as ps(1) writes it."""
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]


def test_one_that_runs_is_not_dying(child: subprocess.Popen[str]) -> None:
    assert not is_dying(child.pid)
    assert not is_dying(os.getpid())


def test_one_that_is_stopped_is_not_dying_and_known_to_be_stopped(child: subprocess.Popen[str]) -> None:
    assert not is_stopped(child.pid)
    child.send_signal(signal.SIGSTOP)
    until(lambda: is_stopped(child.pid))
    assert not is_dying(child.pid)
    child.send_signal(signal.SIGCONT)
    until(lambda: not is_stopped(child.pid))


def test_zombie_is(child: subprocess.Popen[str]) -> None:
    child.kill()
    until(lambda: is_dying(child.pid))
    until(lambda: state(child.pid) == "Z")
    assert is_dying(child.pid)


def test_one_that_was_waited_for_is(child: subprocess.Popen[str]) -> None:
    child.kill()
    child.wait()
    assert is_dying(child.pid)


@pytest.mark.parametrize("number", [signal.SIGSTOP, signal.SIGWINCH])
def test_another_signal_is_not_the_end(child: subprocess.Popen[str], number: signal.Signals) -> None:
    child.send_signal(number)
    if number is signal.SIGSTOP:
        until(lambda: state(child.pid) == "T")
    assert not is_dying(child.pid)


def test_one_whose_last_threads_cannot_go_yet_is(child: subprocess.Popen[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """As when they are inside a system call that waits for us: SIGKILL is pending, and they are there all the same.

    What /proc says of them then is put in its mouth, since there is no such system call without a mount.
    """
    threads = os.listdir(f"/proc/{child.pid}/task")
    assert len(threads) == 2
    killed: list[str] = []

    def status(path: str) -> io.StringIO:
        text = Path(path).read_text()
        if Path(path).parent.name in killed:
            text = re.sub(r"SigPnd:\t\w+", f"SigPnd:\t{1 << signal.SIGKILL - 1:016x}", text)
        return io.StringIO(text)

    monkeypatch.setattr("memfs.owners.liveness.open", status, raising=False)
    for thread in threads:
        assert not is_dying(child.pid)
        killed.append(thread)
    assert is_dying(child.pid)


def test_one_that_proc_does_not_show_is_taken_for_alive(
    child: subprocess.Popen[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As with hidepid=2 (proc(5)), where its directory is not to be seen."""
    child.kill()
    until(lambda: is_dying(child.pid))
    exists = os.path.exists
    monkeypatch.setattr("os.path.exists", lambda path: path != f"/proc/{child.pid}" and exists(path))
    assert not is_dying(child.pid)


def test_one_that_we_may_not_signal_is_looked_at_all_the_same(
    child: subprocess.Popen[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(pid: int, number: int) -> None:
        raise PermissionError

    with monkeypatch.context() as patch:
        patch.setattr("os.kill", refuse)
        assert not is_dying(child.pid)
    child.kill()
    with monkeypatch.context() as patch:
        patch.setattr("os.kill", refuse)
        until(lambda: is_dying(child.pid))
