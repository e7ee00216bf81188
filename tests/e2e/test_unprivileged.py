"""memfs without root: mounted by fusermount3, files on memfds, the size limit kept by the daemon, all of it said."""

from __future__ import annotations

import os
import shutil
import stat
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

from .conftest import run
from .tools import as_user, mount_namespace, skip_without, skip_without_mount_namespace

NOBODY = 65534
DROP = as_user(NOBODY)


class Home:
    """A directory of an unprivileged user's, in a mount namespace in which /dev/fuse is open to all, as distributions
    have it, whatever this machine's is."""

    def __init__(self, path: Path) -> None:
        self.path = path
        path.mkdir(mode=0o755)
        os.chown(path, NOBODY, NOBODY)
        node = path / "fuse"
        os.mknod(node, 0o666 | stat.S_IFCHR, os.makedev(10, 229))
        node.chmod(0o666)
        script = f"mount --bind {node} /dev/fuse && echo ready && exec sleep 600"
        self._namespace = subprocess.Popen(
            [*mount_namespace(path), "sh", "-c", script], stdout=subprocess.PIPE, text=True
        )
        assert self._namespace.stdout is not None
        self.ready = self._namespace.stdout.readline() == "ready\n"
        self.said = ""

    def run(self, *command: str | Path) -> subprocess.CompletedProcess[str]:
        """Run a command as the user, in the namespace, in the directory above the mount."""
        return run(*self._as_user(command), env=self._environment)

    def start(self, *command: str | Path) -> subprocess.Popen[str]:
        """Start a command in the same way; its process is the one that is returned."""
        words = [str(word) for word in self._as_user(command)]
        return subprocess.Popen(
            words, env=self._environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )

    def _as_user(self, command: Sequence[str | Path]) -> list[str | Path]:
        enter = ["nsenter", f"--target={self._namespace.pid}", "--mount"]
        return [*enter, "sh", "-c", 'cd "$0" && exec "$@"', self.path, *DROP, *command]

    @property
    def _environment(self) -> dict[str, str]:
        return {**os.environ, "HOME": str(self.path), "XDG_RUNTIME_DIR": str(self.path)}

    def close(self) -> None:
        self._namespace.kill()
        self._namespace.communicate()
        shutil.rmtree(self.path)


@pytest.fixture
def home() -> Iterator[Home]:
    """A mounted memfs of 16 MiB in mnt, below a directory of the unprivileged user's."""
    if os.geteuid() != 0:
        pytest.skip("becoming another user takes root")
    skip_without("setpriv", "fusermount3", "nsenter")
    skip_without_mount_namespace()
    home = Home(Path(tempfile.gettempdir()) / f"memfs-test-{os.getpid()}")  # pytest's own are closed to others
    try:
        if not home.ready:
            pytest.skip("no mount namespace of our own")
        if home.run(sys.executable, "-c", "import memfs.daemon").returncode:
            pytest.skip("another user cannot read this interpreter or package")
        assert home.run("mkdir", "mnt").returncode == 0
        mounted = home.run(sys.executable, "-P", "-m", "memfs", "mount", "mnt", "-o", "size=16m")
        if mounted.returncode:
            pytest.skip(mounted.stderr.strip())
        home.said = mounted.stderr
        yield home
        assert home.run("fusermount3", "-u", "mnt").returncode == 0
    finally:
        home.run("fusermount3", "-u", "-z", "mnt")
        home.close()


def test_what_is_missing_is_said_and_the_rest_works(home: Home) -> None:
    said = home.said
    assert "mounted by fusermount3" in said
    assert "files live on memfds" in said
    script = """
set -e; cd mnt
echo hello > f; cat f
fallocate -l 8M g; fallocate -p -l 4M g; stat -c '%s %b' g
df --output=used . | tail -1
dd if=/dev/zero of=big bs=1M count=20 2>/dev/null && echo too much || echo full
stat -c %s big; rm big
fallocate -l 20M h 2>/dev/null && echo too much || stat -c '%s %b' h
df --output=used . | tail -1
"""
    result = home.run("bash", "-c", script)
    # 16 MiB less 4 MiB less the page of f: dd gets all that is left, to the byte.
    assert result.stdout.split() == [
        *("hello", "8388608", "8192", "4100", "full", str((12 << 20) - 4096), "0", "0", "4100"),
    ]


def test_sealing_and_owning_work(home: Home) -> None:
    memfs = [sys.executable, "-P", "-m", "memfs"]
    assert home.run(*memfs, "create", "--seals", "guest", "--size", "4M", "mnt/private").returncode == 0
    assert "Operation not permitted" in home.run("cat", "mnt/private").stderr
    assert home.run("touch", "mnt/shared").returncode == 0
    command = ["kvmsim", "run", "--shared", "mnt/shared", "--private", "mnt/private", "--mem", "4M"]
    result = home.run(sys.executable, "-P", "-m", *command)
    assert result.returncode == 0, result.stderr
    assert "every byte was as stored" in result.stdout


def test_what_only_root_can_have_is_refused(home: Home) -> None:
    assert home.run("mkdir", "other").returncode == 0
    for option in ("suid", "dev"):
        result = home.run(sys.executable, "-P", "-m", "memfs", "mount", "other", "-o", f"size=1m,{option}")
        assert (result.returncode, result.stdout) == (1, "")
        assert f"option {option} is for root" in result.stderr
        assert home.run("mountpoint", "other").returncode != 0


#: Becomes root of a user namespace, mounts a memfs there, and says where its socket is and what it says of passthrough.
#: All in one program: it may not be allowed to start this interpreter again
AS_ROOT_OF_ITS_OWN = """
import ctypes, os, pathlib
from memfs.cli.main import main
us, uid, gid = os.getpid(), os.getuid(), os.getgid()
assert ctypes.CDLL(None).unshare(0x10020000) == 0  # CLONE_NEWUSER | CLONE_NEWNS
for name, text in ("setgroups", "deny"), ("uid_map", f"0 {uid} 1"), ("gid_map", f"0 {gid} 1"):
    pathlib.Path("/proc/self", name).write_text(text)
os.makedirs("own", exist_ok=True)
def memfs(*arguments):
    if not (pid := os.fork()):
        main(arguments)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
print(memfs("mount", "own", "-o", "size=1m,passthrough=on"), flush=True)
assert memfs("mount", "own", "-o", "size=1m") == 0
try:
    memfs("stat", "own")
    print(pathlib.Path("own/file").write_text("x"), flush=True)
    memfs("stat", "own")
finally:
    if os.getpid() == us:
        os.system("umount own")
"""


@pytest.mark.parametrize("runtime_directory", [True, False])
def test_user_who_is_root_in_a_namespace_of_its_own_mounts(home: Home, runtime_directory: bool) -> None:
    skip_without("unshare")
    if home.run("unshare", "--user", "--map-root-user", "--mount", "true").returncode:
        pytest.skip("no user namespaces")
    forget = "" if runtime_directory else "import os; del os.environ['XDG_RUNTIME_DIR']\n"
    result = home.run(sys.executable, "-P", "-c", forget + AS_ROOT_OF_ITS_OWN)
    assert result.returncode == 0, result.stderr
    refused, *said = result.stdout.splitlines()
    assert refused == "1"
    assert "option passthrough=on: the daemon has no CAP_SYS_ADMIN on the host" in result.stderr
    directory = home.path / "memfs" if runtime_directory else Path(f"/tmp/memfs-{NOBODY}")
    assert [line.split()[1] for line in said if line.startswith("socket")] == [f"{directory}/{_name(home)}.sock"] * 2
    assert [line.split()[1] for line in said if line.startswith("passthrough")] == ["no"] * 2
    reasons = [line.split("because", 1)[1].strip(" '") for line in said if line.startswith("no passthrough because")]
    assert len(reasons) == 2
    assert all(each.startswith("the daemon has no CAP_SYS_ADMIN on the host") for each in reasons)


def _name(home: Home) -> str:
    return str(home.path / "own").strip("/").replace("/", "-")
