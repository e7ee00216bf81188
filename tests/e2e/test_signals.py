"""No signal leaves a mount or socket that nobody serves: it ends the memfs as umount does, or is not its business."""

from __future__ import annotations

import socket
from collections.abc import Callable
from pathlib import Path
from signal import Signals

import pytest

from tests.helpers import until

from .conftest import Memfs

ENDING = [Signals.SIGQUIT, Signals.SIGABRT, Signals.SIGTRAP, Signals.SIGSYS, Signals.SIGPWR]
IGNORED = [
    *(Signals.SIGHUP, Signals.SIGUSR2, Signals.SIGALRM, Signals.SIGVTALRM, Signals.SIGPROF, Signals.SIGIO),
    *(Signals.SIGPIPE, Signals.SIGXCPU, Signals.SIGXFSZ, Signals.SIGSTKFLT, Signals.SIGCHLD, Signals.SIGURG),
    *(Signals.SIGRTMIN, Signals.SIGRTMAX),
]


@pytest.mark.parametrize("number", ENDING)
def test_signal_ends_it_as_umount_does(memfs: Memfs, number: Signals) -> None:
    (memfs.path / "file").write_bytes(b"x" * 100000)
    memfs.process.send_signal(number)
    memfs.see_end()


def test_signal_that_is_none_of_its_business(memfs: Memfs) -> None:
    for number in IGNORED:
        memfs.process.send_signal(number)
        (memfs.path / "file").write_text(number.name)
        assert (memfs.path / "file").read_text() == number.name
    memfs.stop()


def test_signals_while_it_ends(memfs: Memfs) -> None:
    memfs.run("sh", "-c", "for i in $(seq 300); do echo > $i; done")
    while memfs.process.poll() is None:
        for number in (*ENDING, *IGNORED, Signals.SIGTERM, Signals.SIGINT):
            memfs.process.send_signal(number)
    memfs.see_end()


def nonsense(path: Path) -> None:
    """Have something logged."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as client:
        client.connect(str(path))
        client.send(b"nonsense")
        client.recv(100)


def test_hangup_opens_the_log_anew(memfs: Memfs) -> None:
    """As logrotate(8) does it: the file is moved away, and then the daemon is told."""
    memfs.expected.append("broke the protocol")
    moved = memfs.log.with_suffix(".1")
    for directory in ("first", "second"):
        nonsense(memfs.socket)
        until(lambda: "broke the protocol" in memfs.log.read_text())
        memfs.log.rename(moved)
        nonsense(memfs.socket)
        until(lambda: moved.read_text().count("broke the protocol") == 2)
        memfs.process.send_signal(Signals.SIGHUP)
        until(memfs.log.exists)
        (memfs.path / directory).mkdir()
    nonsense(memfs.socket)
    until(lambda: memfs.log.read_text().count("broke the protocol") == 1)


def test_hangup_leaves_a_log_that_is_where_it_was(memfs: Memfs) -> None:
    memfs.expected.append("broke the protocol")
    nonsense(memfs.socket)
    memfs.process.send_signal(Signals.SIGHUP)
    nonsense(memfs.socket)
    until(lambda: memfs.log.read_text().count("broke the protocol") == 2)


def test_log_that_cannot_be_opened_anew_goes_on(mount_memfs: Callable[..., Memfs]) -> None:
    memfs = mount_memfs()
    memfs.expected += ["broke the protocol", "cannot be opened anew"]
    nonsense(memfs.socket)
    moved = memfs.log.with_suffix(".1")
    until(lambda: "broke the protocol" in memfs.log.read_text())
    memfs.log.rename(moved)
    memfs.log.mkdir()
    memfs.process.send_signal(Signals.SIGHUP)
    until(lambda: "cannot be opened anew" in moved.read_text())
    nonsense(memfs.socket)
    until(lambda: moved.read_text().count("broke the protocol") == 2)
    memfs.log.rmdir()
    moved.rename(memfs.log)
