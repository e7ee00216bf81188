"""What the daemon keeps of root's rights, and that it is enough."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest

from memfs.privileges import KEPT

from .conftest import Memfs, MountMemfs, memfs_command, run, start_memfs
from .test_unprivileged import Home, home  # noqa: F401  (a fixture)
from .tools import needs, skip_without

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="without root there is nothing to give up")
NOBODY = 65534


def statuses(pid: int) -> list[dict[str, str]]:
    """/proc/PID/status of each thread (proc_pid_status(5))."""
    texts = [(task / "status").read_text() for task in Path(f"/proc/{pid}/task").iterdir()]
    return [dict(line.split(":\t", 1) for line in text.splitlines()) for text in texts]


def test_two_capabilities_are_left_in_every_thread(memfs: Memfs) -> None:
    assert memfs.run("fallocate", "-l", "48M", "large").returncode == 0  # in a thread
    assert memfs.run("fallocate", "-p", "-l", "48M", "large").returncode == 0
    kept = sum(1 << capability for capability in KEPT)
    threads = statuses(memfs.process.pid)
    for status in threads:
        assert int(status["CapEff"], 16) == int(status["CapPrm"], 16) == int(status["CapBnd"], 16) == kept
        assert int(status["CapInh"], 16) == int(status["CapAmb"], 16) == 0
        assert status["NoNewPrivs"] == "1"


def test_oom_killer_takes_others_first(memfs: Memfs) -> None:
    if run("sh", "-c", "echo -1000 > /proc/self/oom_score_adj").returncode:
        pytest.skip("this root may not say so (CAP_SYS_RESOURCE)")
    assert Path(f"/proc/{memfs.process.pid}/oom_score_adj").read_text() == "-1000\n"


def test_what_is_left_is_enough(mount_memfs: MountMemfs) -> None:
    memfs = mount_memfs("size=8m")
    assert memfs.run(*memfs_command("create", "--seals", "guest", "--size", "4m", "private")).returncode == 0
    assert memfs.run("fallocate", "-l", "4m", "private").returncode == 0
    assert run(*memfs_command("remount", memfs.path, "-o", "size=16m")).returncode == 0
    assert memfs.run("fallocate", "-l", "10m", "ordinary").returncode == 0
    assert "No space left" in memfs.run("fallocate", "-l", "14m", "ordinary").stderr
    assert memfs.run("sh", "-c", "echo hello > small && cat small").stdout == "hello\n"
    assert memfs.run("chown", "1:1", "small").returncode == 0
    assert memfs.run("chmod", "0", "small").returncode == 0


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_unmounts_below_a_directory_that_is_closed_to_root(can_mount: None, number: signal.Signals) -> None:
    with tempfile.TemporaryDirectory(prefix="memfs-test-") as name:
        (Path(name) / "home").mkdir()
        memfs = start_memfs(Path(name) / "home", "size=1m", "--socket", f"{name}/sock")
        try:
            os.chown(Path(name) / "home", NOBODY, NOBODY)
            (Path(name) / "home").chmod(0o700)
            memfs.process.send_signal(number)
            assert memfs.process.wait(20) == 0
            assert not os.path.ismount(memfs.path)
        finally:
            memfs.kill()


@needs("pgrep")
def test_daemon_of_a_user_is_closed_to_the_user(home: Home) -> None:  # noqa: F811
    """It has no capabilities, fusermount3 still works for it (the fixture unmounts), and nobody looks into it."""
    pid = int(run("sh", "-c", f"pgrep -u {NOBODY} -f 'memfs mount mnt'").stdout.split()[0])
    for status in statuses(pid):
        assert int(status["CapEff"], 16) == int(status["CapPrm"], 16) == 0
        assert status["NoNewPrivs"] == "0"
    assert run("sh", "-c", f"grep 'core file' /proc/{pid}/limits").stdout.split()[4:6] == ["0", "0"]
    for look in (f"ls /proc/{pid}/fd/", f"cat /proc/{pid}/maps", f"cat /proc/{pid}/environ"):
        looked = home.run("sh", "-c", look)
        assert looked.returncode != 0
        assert "ermission denied" in looked.stderr
    assert subprocess.run(["ls", f"/proc/{pid}/fd/"], capture_output=True, check=False).returncode == 0  # root may


def test_kvmsim_of_a_user_is_closed_to_the_user(home: Home) -> None:  # noqa: F811
    """It has guest memory mapped, and a copy of it."""
    memfs = [sys.executable, "-P", "-m", "memfs"]
    assert home.run(*memfs, "create", "--seals", "guest", "--size", "4M", "mnt/private").returncode == 0
    assert home.run("touch", "mnt/shared").returncode == 0
    kvmsim = [sys.executable, "-P", "-m", "kvmsim", "run", "--shared", "mnt/shared", "--private", "mnt/private"]
    guest = home.start(*kvmsim, "--mem", "4M", "--duration", "60")
    try:
        deadline = time.monotonic() + 20
        while home.run("stat", "-c", "%b", "mnt/private").stdout == "0\n":
            assert time.monotonic() < deadline, "the guest does not start"
        for look in ("ls /proc/{}/fd/", "ls /proc/{}/map_files/", "cat /proc/{}/maps", "head -c 1 /proc/{}/mem"):
            assert "ermission denied" in home.run("sh", "-c", look.format(guest.pid)).stderr, look
        assert run("sh", "-c", f"grep 'core file' /proc/{guest.pid}/limits").stdout.split()[4:6] == ["0", "0"]
    finally:
        guest.kill()
        guest.communicate()


WITHOUT_CAPABILITIES = ["setpriv", "--bounding-set=-all", "--inh-caps=-all", "--ambient-caps=-all"]


@pytest.mark.parametrize(
    "as_whom",
    [
        WITHOUT_CAPABILITIES,
        [*WITHOUT_CAPABILITIES, "unshare", "--user", "--map-root-user"],
        ["unshare", "--user", "--map-root-user"],
    ],
    ids=["uid 0 of a container", "that in a user namespace of its own", "root in a user namespace of its own"],
)
def test_who_has_no_power_over_the_mount_does_not_remount_it(memfs: Memfs, as_whom: list[str]) -> None:
    skip_without("setpriv", "unshare", "setfattr")
    if run(*as_whom, "true").returncode:
        pytest.skip("this root may not drop capabilities, or make a user namespace")
    before = os.statvfs(memfs.path).f_blocks
    tried = run(*as_whom, *memfs_command("remount", memfs.path, "-o", "size=1g"))
    assert (tried.returncode, tried.stderr) == (1, f"memfs: {memfs.path}: Operation not permitted\n")
    for attribute in ("user.memfs.remount", "trusted.memfs.remount"):
        assert run(*as_whom, "setfattr", "-n", attribute, "-v", "size=1g", memfs.path).returncode != 0
    assert os.statvfs(memfs.path).f_blocks == before
    assert run(*memfs_command("remount", memfs.path, "-o", "size=1g")).returncode == 0
    assert os.statvfs(memfs.path).f_blocks > before


def test_user_remounts_what_is_the_user_s(home: Home) -> None:  # noqa: F811
    assert home.run(sys.executable, "-P", "-m", "memfs", "remount", "mnt", "-o", "size=8m").returncode == 0
    assert home.run("stat", "--file-system", "--format=%b", "mnt").stdout == f"{(8 << 20) // 4096}\n"
