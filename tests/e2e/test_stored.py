"""A service manager that keeps descriptors (systemd's FileDescriptorStoreMax=): even the keeper's death is survived.

Here a few lines are the service manager; tests/e2e/test_package.py has systemd.
"""

from __future__ import annotations

import fcntl
import os
import select
import signal
import socket
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from memfs.handed_over import KEPT

from .conftest import memfs_command, run, stat_json
from .test_upgrade import working

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="what survives its daemon is for root")

FIRST = 3  # sd_listen_fds(3)


class Manager:
    """Starts a memfs as a service, and keeps what it is given."""

    def __init__(self, directory: Path) -> None:
        self.mountpoint, self.log = directory / "mnt", directory / "log"
        self.mountpoint.mkdir()
        self.address = directory / "notify"
        self.socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self.socket.bind(str(self.address))
        self.stored: dict[str, int] = {}
        self.main_pid = 0
        self.service: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """Start it, as the first time or after its end, and wait until it is ready."""
        fds = [fcntl.fcntl(fd, fcntl.F_DUPFD_CLOEXEC, 200) for fd in self.stored.values()]
        inherited = range(FIRST, FIRST + len(fds))

        def pass_on() -> None:
            for number, fd in zip(inherited, fds, strict=True):
                os.dup2(fd, number)

        command = memfs_command("mount", "-f", "--log-file", self.log, "-o", "size=64m,survive=on", self.mountpoint)
        self.service = subprocess.Popen(
            ["sh", "-c", 'LISTEN_PID=$$ exec "$@"', "sh", *command],
            stdout=subprocess.DEVNULL,
            pass_fds=tuple(inherited),
            preexec_fn=pass_on,
            env={
                **os.environ,
                "NOTIFY_SOCKET": str(self.address),
                "LISTEN_FDS": str(len(fds)),
                "LISTEN_FDNAMES": ":".join(self.stored),
            },
        )
        for fd in fds:
            os.close(fd)
        self.main_pid = self.service.pid
        self.hear_until("READY=1")

    def hear_until(self, wanted: str) -> None:
        """Take what is said until something is."""
        while True:
            assert select.select([self.socket], [], [], 20)[0], f"nobody says {wanted}"
            message, fds, _, _ = socket.recv_fds(self.socket, 4096, 8)
            lines = message.decode().split("\n")
            said = dict(line.split("=", 1) for line in lines)
            name = said.get("FDNAME", "")
            if "FDSTOREREMOVE" in said:
                os.close(self.stored.pop(name))
            for fd in fds:
                self.stored[name] = fd
            self.main_pid = int(said.get("MAINPID", self.main_pid))
            if wanted in lines or wanted in said:
                return

    def kill(self, *pids: int) -> None:
        """Kill processes, of which none sees another's end, and wait for that of the service."""
        for number in (signal.SIGSTOP, signal.SIGKILL):
            for pid in pids:
                os.kill(pid, number)
        assert self.service is not None
        self.service.wait(20)

    @property
    def worker(self) -> int:
        pid = stat_json(self.mountpoint)["pid"]
        assert isinstance(pid, int)
        return pid

    def end(self) -> None:
        run("umount", "--lazy", self.mountpoint)
        for fd in self.stored.values():
            os.close(fd)
        self.socket.close()
        if self.service is not None:
            self.service.wait(20)


@pytest.fixture
def manager(can_mount: None, tmp_path: Path) -> Iterator[Manager]:
    manager = Manager(tmp_path)
    try:
        yield manager
    finally:
        manager.end()


def test_what_a_mount_consists_of_is_kept_and_gone_on_with(manager: Manager) -> None:
    manager.start()
    assert list(manager.stored) == list(KEPT)
    with working(manager.mountpoint):
        for generation in (2, 3):
            manager.kill(manager.worker, manager.main_pid)  # all of it is gone
            manager.start()
            state = stat_json(manager.mountpoint)
            assert (state["generation"], state["restarts"], state["survives"]) == (generation, generation - 1, True)
        worker = manager.worker
        manager.kill(manager.main_pid)  # and only the keeper: the worker leaves it to the next one
        manager.start()
        assert manager.worker != worker
    assert list(manager.stored) == list(KEPT)


def test_the_socket_of_what_is_gone_on_with_is_not_for_others(manager: Manager, tmp_path: Path) -> None:
    manager.start()
    manager.kill(manager.worker, manager.main_pid)
    manager.start()
    other, path = tmp_path / "other", Path(str(stat_json(manager.mountpoint)["socket"]))
    other.mkdir()
    refused = run(*memfs_command("mount", "--socket", path, other))
    run("umount", "--lazy", other)  # or it was not refused
    assert refused.returncode == 1
    assert "another memfs listens there" in refused.stderr
    assert path.is_socket()


def test_a_socket_that_somebody_has_removed_is_made_anew_and_kept(manager: Manager) -> None:
    manager.start()
    path = Path(str(stat_json(manager.mountpoint)["socket"]))
    path.unlink()
    for _ in range(2):
        manager.kill(manager.worker, manager.main_pid)
        manager.start()
        with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as owner:
            owner.connect(str(path))


def test_an_upgrade_makes_another_process_the_main_one(manager: Manager) -> None:
    manager.start()
    before = manager.main_pid
    assert run(*memfs_command("upgrade", manager.mountpoint)).returncode == 0
    manager.hear_until("MAINPID")
    assert manager.main_pid != before
    assert Path(f"/proc/{manager.worker}/stat").read_text().split()[3] == str(manager.main_pid)
    manager.kill(manager.worker, manager.main_pid)
    manager.start()
    assert stat_json(manager.mountpoint)["generation"] == 3


def test_what_has_ended_is_let_go_and_mounted_anew(manager: Manager) -> None:
    manager.start()
    (manager.mountpoint / "file").write_text("content")
    assert run("umount", manager.mountpoint).returncode == 0
    assert manager.service is not None
    assert manager.service.wait(20) == 0
    manager.start()
    assert list(manager.mountpoint.iterdir()) == []
    assert stat_json(manager.mountpoint)["generation"] == 1
    assert list(manager.stored) == list(KEPT)
