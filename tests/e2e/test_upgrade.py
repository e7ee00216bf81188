"""`memfs upgrade`: other code goes on with a mount, and where it cannot, that which served it does.

The other code is a copy of memfs's with another version, and with faults.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

import memfs as package
from tests.helpers import until

from .conftest import Memfs, MountMemfs, memfs_command, run, stat_json
from .lying_filesystem import lying
from .test_survival import EXPECTED
from .tools import open_to_all

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="what survives its daemon is for root")

UPGRADED = "upgraded to"


class Code:
    """A copy of the program, with changes in its files."""

    def __init__(self, directory: Path, version: str, **changes: tuple[str, str]) -> None:
        shutil.copytree(Path(package.__file__).parent, directory / "memfs")
        self.directory = directory
        self.change("contract/version", f'"{package.__version__}"', f'"{version}"')
        for file, (before, after) in changes.items():
            self.change(file, before, after)

    def change(self, file: str, before: str, after: str) -> None:
        path = self.directory / "memfs" / f"{file.replace('__of__', '/')}.py"
        assert before in path.read_text(), f"{path} has no {before}"
        path.write_text(path.read_text().replace(before, after, 1))

    def upgrade(self, memfs: Memfs) -> subprocess.CompletedProcess[str]:
        return run(*memfs_command("upgrade", memfs.path), cwd=self.directory, env={**os.environ, "PYTHONPATH": ""})


@contextmanager
def working(path: Path) -> Iterator[None]:
    """Have a program work on a memfs for as long as the block takes. It must not get a single error."""
    script = """
import os, sys
print(flush=True)
number = 0
with open(sys.argv[1] + "/worked-on", "w+b", buffering=0) as file:
    while not os.path.exists(sys.argv[1] + "/enough"):
        number += 1
        os.pwrite(file.fileno(), b"%d" % number, 0)
        os.mkdir(sys.argv[1] + "/d"), os.rename(sys.argv[1] + "/d", sys.argv[1] + "/e"), os.rmdir(sys.argv[1] + "/e")
        assert os.pread(file.fileno(), 100, 0) == b"%d" % number
"""
    process = subprocess.Popen([sys.executable, "-c", script, path], stdout=subprocess.PIPE)
    assert process.stdout is not None
    with process.stdout:
        process.stdout.readline()
        yield
        (path / "enough").touch()
        assert process.wait(60) == 0


def test_other_code_goes_on_and_nobody_sees_an_error(mount_memfs: MountMemfs, tmp_path: Path) -> None:
    memfs = mount_memfs("size=64m,survive=on")
    code = Code(tmp_path / "new", "9.0")
    guest = memfs.path / "guest"
    assert run(*memfs_command("create", guest, "--seals", "guest", "--size", "1m", "--allocate")).returncode == 0
    with (memfs.path / "gone").open("w+") as gone:
        gone.write("unlinked")
        gone.flush()
        (memfs.path / "gone").unlink()
        with working(memfs.path):
            result = code.upgrade(memfs)
        assert (result.returncode, result.stderr) == (0, "")
        assert "is served by 9.0 now" in result.stdout
        gone.seek(0)
        assert gone.read() == "unlinked"
    assert memfs.process.wait(20) == 0
    assert guest.stat().st_blocks == 2048
    state = stat_json(memfs.path)
    assert (state["version"], state["generation"], state["restarts"], state["survives"]) == ("9.0", 2, 0, True)
    worker = state["pid"]
    assert isinstance(worker, int)
    os.kill(worker, signal.SIGKILL)
    state = stat_json(memfs.path)
    assert (state["version"], state["generation"], state["restarts"]) == ("9.0", 3, 1)
    assert run(*memfs_command("upgrade", memfs.path)).returncode == 0  # and back
    state = stat_json(memfs.path)
    assert (state["version"], state["generation"], state["restarts"]) == (package.__version__, 4, 1)
    assert run("umount", memfs.path).returncode == 0
    sockets = [memfs.socket, Path(str(state["keeper_socket"]))]
    until(lambda: not any(each.exists() for each in sockets), 20)
    memfs.expected = [UPGRADED, *EXPECTED]
    lines = memfs.log.read_text().splitlines()
    assert [line for line in lines if not any(part in line for part in memfs.expected)] == []


FAULTS = {
    "does not compile": ("daemon", "import pyfuse3\n", "import pyfuse3 as\n"),
    "wants another Python": ("upgrade", "import socket\n", "import socket\nimport no_such_module\n"),
    "knows another format": ("upgrade", "FORMAT: Final = 1", "FORMAT: Final = 2"),
    "cannot read the state": ("state__of__log", "frozenset({VERSION})", "frozenset({7})"),
    "does not know an option": ("options", '    "notify_timeout": ("notify_timeout", _parse_seconds),\n', ""),
}


def test_what_cannot_go_on_touches_nothing(mount_memfs: MountMemfs, tmp_path: Path) -> None:
    memfs = mount_memfs("size=64m,survive=on,notify_timeout=4")
    worker = stat_json(memfs.path)["pid"]
    for number, (fault, (file, before, after)) in enumerate(FAULTS.items()):
        result = Code(tmp_path / str(number), "9.0", **{file: (before, after)}).upgrade(memfs)
        assert result.returncode == 1, fault
        [sentence] = result.stderr.splitlines()
        assert sentence.startswith("memfs: "), fault
        assert stat_json(memfs.path)["pid"] == worker, fault
    assert stat_json(memfs.path)["generation"] == 1


def test_one_that_fails_when_it_takes_over_is_followed_by_the_old(mount_memfs: MountMemfs, tmp_path: Path) -> None:
    memfs = mount_memfs("size=64m,survive=on")
    memfs.expected = ["a bug in memfs ends", "an upgrade has failed: going on"]
    (memfs.path / "file").write_text("content")
    rebuild = ("tree__of__rebuild", "    parents: list[tuple[Directory, int]] = []\n")
    for number, fault in enumerate(
        ["    raise RuntimeError\n", "    import os, time; os.kill(os.getppid(), 9); time.sleep(60)\n"]
    ):
        file, before = rebuild
        code = Code(tmp_path / str(number), "9.0", **{file: (before, fault + before)})
        with working(memfs.path):
            result = code.upgrade(memfs)
        (memfs.path / "enough").unlink()
        assert result.returncode == 1
        assert result.stderr == ("memfs: this version did not come up, and the one before goes on; the log says why\n")
        assert (memfs.path / "file").read_text() == "content"
        state = stat_json(memfs.path)
        assert (state["version"], state["restarts"]) == (package.__version__, number + 1)
    assert memfs.process.poll() is None


def test_one_that_takes_for_ever_is_followed_by_the_old(tmp_path: Path) -> None:
    """The old one is a copy, too, that has less patience."""
    mountpoint, log = tmp_path / "mnt", tmp_path / "log"
    mountpoint.mkdir()
    old = Code(tmp_path / "old", "8.0", upgrade=("_LONGEST: Final = 30.0", "_LONGEST: Final = 0.5"))
    line = "    parents: list[tuple[Directory, int]] = []\n"
    new = Code(tmp_path / "new", "9.0", tree__of__rebuild=(line, f"    import time; time.sleep(1000)\n{line}"))
    command = memfs_command("mount", mountpoint, "--log-file", log, "-o", "size=64m,survive=on")
    assert run(*command, cwd=old.directory).returncode == 0
    try:
        with working(mountpoint):
            result = run(*memfs_command("upgrade", mountpoint), cwd=new.directory)
        assert result.returncode == 1
        state = stat_json(mountpoint)
        assert (state["version"], state["restarts"]) == ("8.0", 1)
        assert "has not taken over in 0.5 s" in log.read_text()
    finally:
        run("umount", "--lazy", mountpoint)


def test_a_state_of_a_newer_version_is_not_gone_on_with_by_an_older(mount_memfs: MountMemfs, tmp_path: Path) -> None:
    memfs = mount_memfs("size=64m,survive=on")
    code = Code(tmp_path / "new", "9.0", state__of__log=("VERSION: Final = 1", "VERSION: Final = 2"))
    code.change("state/log", "frozenset({VERSION})", "frozenset({1, VERSION})")
    (memfs.path / "file").write_text("content")
    assert code.upgrade(memfs).returncode == 0
    worker = stat_json(memfs.path)["pid"]
    result = run(*memfs_command("upgrade", memfs.path))
    assert result.returncode == 1
    assert result.stderr == (
        f"memfs: no upgrade to {package.__version__}: the state has version 2; this memfs reads version 1; "
        "nothing has changed\n"
    )
    assert stat_json(memfs.path)["pid"] == worker
    assert (memfs.path / "file").read_text() == "content"
    assert run("umount", memfs.path).returncode == 0


def test_whoever_is_not_root_gets_nothing(mount_memfs: MountMemfs) -> None:
    memfs = mount_memfs("size=64m,survive=on,allow_other")
    keeper = str(stat_json(memfs.path)["keeper_socket"])
    assert Path(keeper).stat().st_mode & 0o777 == 0o600
    os.chmod(keeper, 0o666)  # and if it were not
    connect = f"""
import os, socket
os.setuid(12001)
with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as sock:
    sock.connect({keeper!r})
    print(socket.recv_fds(sock, 1000, 100)[:2])
"""
    assert run(sys.executable, "-c", connect).stdout == "(b'', [])\n"
    memfs.expected = ["somebody who is not root has asked"]


@pytest.mark.parametrize(("mounter", "said"), [(12001, "user 12001 has mounted it"), (0, "another user listens on ")])
def test_root_takes_nothing_over_from_a_stranger(can_mount: None, tmp_path: Path, mounter: int, said: str) -> None:
    """Whose mount or socket it is shows before anything is done that it says: where the log is, above all."""
    mountpoint, path = tmp_path / "mnt", tmp_path / "socket"
    mountpoint.mkdir()
    said_to_root = json.dumps({"format": 1, "environment": {}, "log": str(tmp_path / "log"), "level": 10})
    listen = f"""
import os, socket
os.setuid(12001)
with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as sock:
    sock.bind({str(path)!r})
    sock.listen()
    print("listening", flush=True)
    while True:
        client, _ = sock.accept()
        client.send({said_to_root!r}.encode())
"""
    open_to_all(tmp_path)
    tmp_path.chmod(0o777)
    with subprocess.Popen([sys.executable, "-c", listen], stdout=subprocess.PIPE, text=True) as stranger:
        try:
            assert stranger.stdout is not None
            assert stranger.stdout.readline() == "listening\n"
            with lying(mountpoint, json.dumps({"keeper_socket": str(path), "pid": stranger.pid}), mounter):
                result = run(*memfs_command("upgrade", mountpoint))
        finally:
            stranger.kill()
    assert result.returncode == 1
    assert said in result.stderr
    assert not (tmp_path / "log").exists()


def test_what_does_not_survive_cannot_be_handed_over(mount_memfs: MountMemfs) -> None:
    memfs = mount_memfs("size=64m,survive=off")
    result = run(*memfs_command("upgrade", memfs.path))
    assert result.returncode == 1
    assert result.stderr == (
        f"memfs: {memfs.path}: it cannot be handed over (switched off (survive=off)); unmount it and mount it anew\n"
    )
