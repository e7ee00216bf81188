"""Real mounts for the tests: each memfs in its own process, never the one that runs the tests.

A memfs is started with --check, so that it verifies every invariant when it is unmounted, and it must then exit with 0
and have logged nothing that its test did not expect.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import pytest

from memfs.contract.sys.hugetlb import Pool
from tests.huge_pages import huge_pages

from .injection import Injection

STOP_TIMEOUT = 20  # seconds


@dataclass
class Memfs:
    """A mounted memfs."""

    path: Path
    socket: Path
    process: subprocess.Popen[str]
    log: Path
    notes: str  #: what it said at mount time
    expected: list[str] = field(default_factory=list)  #: parts of log lines that may be there

    def run(self, *command: str | Path, **options: object) -> subprocess.CompletedProcess[str]:
        """Run a shell tool in the mount's root."""
        return run(*command, cwd=self.path, **options)

    def stop(self) -> None:
        """Unmount as umount(8) does and see that it ended well."""
        deadline = time.monotonic() + STOP_TIMEOUT
        while (result := run("umount", self.path)).returncode:  # what a test has killed may take a moment to let go
            assert "busy" in result.stderr, result.stderr + self.log.read_text()
            assert time.monotonic() < deadline, result.stderr
            time.sleep(0.05)
        self.see_end()

    def see_end(self) -> None:
        """It has been told to end: see that it does so well."""
        code = self.process.wait(STOP_TIMEOUT)
        lines = [line for line in self.log.read_text().splitlines() if not any(part in line for part in self.expected)]
        assert code == 0, "\n".join(lines)
        assert lines == []
        assert not os.path.ismount(self.path)
        assert not self.socket.exists()

    def kill(self) -> None:
        """Whatever happened, leave no process and no mount."""
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
            with contextlib.suppress(subprocess.TimeoutExpired):
                self.process.wait(STOP_TIMEOUT)
        if self.process.poll() is None:
            self.process.kill()
            self.process.wait()
        subprocess.run(["umount", "--lazy", str(self.path)], check=False, capture_output=True)


def run(*command: str | Path, **options: object) -> subprocess.CompletedProcess[str]:
    """Run a command and return what it printed and its exit code."""
    options.setdefault("timeout", 60)
    return subprocess.run([str(part) for part in command], capture_output=True, text=True, check=False, **options)  # type: ignore[call-overload,no-any-return]


def interruptible() -> None:
    """Have SIGINT and SIGHUP end a child; for its `preexec_fn`.

    Tests in the background of a script, or below nohup(1), inherit that they are ignored.
    """
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    signal.signal(signal.SIGHUP, signal.SIG_DFL)


def memfs_command(*arguments: str | Path) -> list[str]:
    """The command line of `memfs`, run with the interpreter that runs the tests."""
    return [sys.executable, "-m", "memfs", *map(str, arguments)]


def state_of(path: Path) -> dict[str, Any]:
    """What the memfs that a path lies on says of itself; asked of it and not of a command, which would take long."""
    state: dict[str, Any] = json.loads(os.getxattr(path, "user.memfs.stat"))
    return state


def stat_json(path: Path) -> dict[str, Any]:
    """What `memfs stat --json` says of the memfs that a path lies on."""
    result = run(*memfs_command("stat", "--json", path))
    assert result.returncode == 0, result.stderr
    state: dict[str, Any] = json.loads(result.stdout)
    return state


def start_memfs(directory: Path, options: str, *extra: str, within: Sequence[str] = ()) -> Memfs:
    """Mount a memfs on directory/mnt, by a command that is run `within` another, such as unshare(1).

    Raises AssertionError with its words if it cannot.
    """
    mountpoint, socket, log = directory / "mnt", directory / "memfs.sock", directory / "log"
    mountpoint.mkdir()
    command = memfs_command("mount", mountpoint, "-f", "--check", "--socket", socket, "--log-file", log, "-o", options)
    words = directory / "stderr"
    with words.open("w") as stderr:
        process = subprocess.Popen([*within, *command, *extra], stdout=subprocess.PIPE, stderr=stderr, text=True)
    assert process.stdout is not None
    with process.stdout:
        is_mounted = bool(process.stdout.readline())
    memfs = Memfs(mountpoint, socket, process, log, words.read_text())
    if not is_mounted:
        memfs.kill()
        raise AssertionError(memfs.notes)
    return memfs


@pytest.fixture(scope="session")
def can_mount(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Skip with memfs's own sentence where it cannot mount."""
    directory = tmp_path_factory.mktemp("can-mount")
    try:
        memfs = start_memfs(directory, "size=1m")
    except AssertionError as error:
        pytest.skip(str(error).strip())
    memfs.stop()


class MountMemfs(Protocol):
    """The fixture `mount_memfs`."""

    def __call__(self, options: str = "size=64m", *extra: str, within: Sequence[str] = ()) -> Memfs:
        """Mount a memfs with options of mount(8) and further arguments."""


@pytest.fixture
def mount_memfs(can_mount: None, tmp_path_factory: pytest.TempPathFactory) -> Iterator[MountMemfs]:
    """A function that mounts memfs's with options; they are unmounted, and checked, after the test."""
    mounted: list[Memfs] = []

    def mount(options: str = "size=64m", *extra: str, within: Sequence[str] = ()) -> Memfs:
        memfs = start_memfs(tmp_path_factory.mktemp("memfs"), options, *extra, within=within)
        mounted.append(memfs)
        return memfs

    try:
        yield mount
        for memfs in mounted:
            if memfs.process.poll() is None:
                memfs.stop()
    finally:
        for memfs in mounted:
            memfs.kill()


@pytest.fixture
def memfs(mount_memfs: MountMemfs) -> Memfs:
    """A memfs of 64 MiB."""
    return mount_memfs()


@pytest.fixture
def injection(tmp_path: Path) -> Injection:
    """What processes that are started with its environment stumble over."""
    return Injection(tmp_path)


@pytest.fixture
def in_memfs(injection: Injection, monkeypatch: pytest.MonkeyPatch) -> Injection:
    """What memfs's that are mounted from now on stumble over."""
    for name, value in injection.environment.items():
        monkeypatch.setenv(name, value)
    return injection


@pytest.fixture
def pool() -> Iterator[Pool]:
    """A pool of which twenty huge pages of 2 MiB can be had."""
    if os.geteuid() != 0:
        pytest.skip("only root mounts a hugetlbfs")
    with huge_pages(20) as pool:
        yield pool


@pytest.fixture
def tmpfs(can_mount: None, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A real tmpfs of 64 MiB, to compare with."""
    path = tmp_path_factory.mktemp("tmpfs")
    result = run("mount", "-t", "tmpfs", "-o", "size=64m", "tmpfs", path)
    if result.returncode:
        pytest.skip(f"cannot mount a tmpfs to compare with: {result.stderr.strip()}")
    try:
        yield path
    finally:
        run("umount", "--lazy", path)
