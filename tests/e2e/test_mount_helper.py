"""memfs in the hands of the real mount(8): fstab(5), `mount -a`, remount and umount, beside a tmpfs.

mount(8) looks for its helpers in /sbin and nowhere else. So these tests have a mount namespace of their own, with the
helper laid over /sbin there; nothing of it is seen outside.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from .conftest import STOP_TIMEOUT, memfs_command, run
from .tools import mount_namespace, skip_without, skip_without_mount_namespace

SETUP = 'mount -t tmpfs tmpfs "$1" && mkdir "$1/upper" "$1/work" && mv "$2" "$1/upper/mount.fuse.memfs" && {}'.format(
    'mount -t overlay overlay -o "lowerdir=$3,upperdir=$1/upper,workdir=$1/work" "$3" && echo ready && exec cat'
)
HELPER = f"#!{sys.executable}\nfrom memfs.contract.start import mount_helper\nmount_helper()\n"


class Namespace:
    """A mount namespace in which mount(8) finds the helper."""

    def __init__(self, directory: Path) -> None:
        self.mountpoint = directory / "mnt"
        self.mountpoint.mkdir()
        self.fstab = directory / "fstab"
        self.socket = directory / "memfs.sock"
        helper, laid = directory / "helper", directory / "laid"
        helper.write_text(HELPER)
        helper.chmod(0o755)
        laid.mkdir()
        command = [*mount_namespace(directory, "--propagation", "private"), "sh", "-c", SETUP, "sh"]
        self._holder = subprocess.Popen(
            [*command, str(laid), str(helper), os.path.realpath("/sbin")],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        assert self._holder.stdout is not None
        if self._holder.stdout.readline() != "ready\n":
            pytest.skip(f"nothing can be laid over /sbin here: {self._holder.communicate()[1].strip()}")

    def __call__(self, *command: str | Path) -> subprocess.CompletedProcess[str]:
        """Run a command in it."""
        return run(*self.within(*command))

    def within(self, *command: str | Path) -> list[str | Path]:
        """Return the command line that runs a command in it."""
        return ["nsenter", f"--mount=/proc/{self._holder.pid}/ns/mnt", f"--wd={os.getcwd()}", *command]

    def mount(self, options: str, source: str = "none") -> subprocess.CompletedProcess[str]:
        """Mount a memfs on the mountpoint as mount(8) does."""
        return self("mount", "-t", "fuse.memfs", "-o", f"{options},socket={self.socket}", source, self.mountpoint)

    def mounted(self, path: Path) -> list[str]:
        """Return source, flags, type and size of what is mounted on a path, if anything is."""
        found = self("findmnt", "--noheadings", "--output", "SOURCE,VFS-OPTIONS,FSTYPE,SIZE", "--mountpoint", path)
        return found.stdout.split()

    def end(self) -> None:
        """Unmount everything, and let the namespace go."""
        self("umount", "--lazy", self.mountpoint)
        self._holder.communicate(timeout=STOP_TIMEOUT)


@pytest.fixture
def namespace(can_mount: None, tmp_path: Path) -> Iterator[Namespace]:
    if os.geteuid():
        pytest.skip("needs root")
    skip_without("nsenter", "findmnt")
    skip_without_mount_namespace()
    namespace = Namespace(tmp_path)
    try:
        yield namespace
    finally:
        namespace.end()


def test_line_of_fstab_is_mounted_once_remounted_and_unmounted(namespace: Namespace) -> None:
    options = f"size=1g,huge=never,nofail,noatime,socket={namespace.socket},x-systemd.requires=a.service,comment=b"
    namespace.fstab.write_text(f"none {namespace.mountpoint} fuse.memfs {options} 0 0\n")
    for _ in range(2):  # the second time it is mounted already
        result = namespace("mount", "--all", "--fstab", namespace.fstab)
        assert (result.returncode, result.stdout, result.stderr) == (0, "", "")
        assert namespace.mounted(namespace.mountpoint) == ["none", "rw,noatime", "fuse.memfs", "1G"]
    assert len(namespace("findmnt", "--noheadings", "--mountpoint", namespace.mountpoint).stdout.splitlines()) == 1
    for changes in ("size=2g", "size=2g,ro", "size=2g,rw,nodiratime"):  # each beside what stands in fstab
        command = ("mount", "--fstab", namespace.fstab, "-o", f"remount,{changes}", namespace.mountpoint)
        result = namespace(*command)
        assert (result.returncode, result.stderr) == (0, "")
        flags = "ro" if ",ro" in changes else "rw"
        atime = "noatime,nodiratime" if "nodiratime" in changes else "noatime"
        assert namespace.mounted(namespace.mountpoint)[1:] == [f"{flags},{atime}", "fuse.memfs", "2G"]
    assert namespace("umount", namespace.mountpoint).returncode == 0
    assert namespace.mounted(namespace.mountpoint) == []


def test_source_stands_in_mounts_as_it_was_given(namespace: Namespace) -> None:
    for source in ("memfs#guest", "none", "a b,c"):
        assert namespace.mount("size=1m", source).returncode == 0
        found = namespace(
            "findmnt", "--noheadings", "--raw", "--output", "SOURCE", "--mountpoint", namespace.mountpoint
        )
        assert found.stdout == source.replace(" ", "\\x20") + "\n"
        assert namespace("umount", namespace.mountpoint).returncode == 0


def test_remount_without_fstab_says_what_mounts_has(namespace: Namespace) -> None:
    assert namespace.mount("size=8m,huge=never").returncode == 0
    result = namespace("mount", "-o", "remount,size=4m,ro", namespace.mountpoint)
    assert (result.returncode, result.stderr) == (0, "")
    assert namespace.mounted(namespace.mountpoint) == ["none", "ro,relatime", "fuse.memfs", "4M"]
    assert namespace("touch", namespace.mountpoint / "file").returncode == 1
    assert namespace("mount", "-o", "remount,rw", namespace.mountpoint).returncode == 0
    assert namespace("touch", namespace.mountpoint / "file").returncode == 0


@pytest.mark.parametrize("spelling", ["-N {}", "-N{}", "-vfN {}", "-N /nowhere -N{}"])
def test_another_namespace_is_named_in_any_spelling(namespace: Namespace, spelling: str) -> None:
    """And the helper does there what it was asked for here."""
    where = spelling.format(namespace.within()[1].partition("=")[2])  # type: ignore[union-attr]
    options = f"-osize=8m,huge=never -osocket={namespace.socket}"
    helper = namespace.mountpoint.parent / "laid/upper/mount.fuse.memfs"
    result = namespace(helper, "a b", *where.split(), namespace.mountpoint, *options.split())
    assert (result.returncode, result.stderr) == (0, "")
    fake = "f" in spelling
    assert namespace.mounted(namespace.mountpoint) == ([] if fake else ["a", "b", "rw,relatime", "fuse.memfs", "8M"])


REFUSED = {
    "unknown option": ("size=1m,nonsense", "unknown option 'nonsense'"),
    "no size": ("size=big", "option 'size=big'"),
    "what only /proc/mounts says": ("size=1m,user_id=0", "unknown option 'user_id'"),
    "remount of nothing": ("remount,size=1m", "does not lie on a memfs"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_refused_is_said_with_the_code_of_mount(namespace: Namespace, name: str) -> None:
    options, words = REFUSED[name]
    result = namespace.mount(options)
    assert (result.returncode, result.stderr.count("\n")) == (32, 1)
    assert result.stderr.startswith("mount.fuse.memfs: ")
    assert words in result.stderr
    assert namespace.mounted(namespace.mountpoint) == []


def test_refused_remount_changes_nothing(namespace: Namespace) -> None:
    assert namespace.mount("size=8m").returncode == 0
    before = namespace.mounted(namespace.mountpoint)
    for options in ("ro,size=4m,huge=always", "size=4m,mode=700", "ro,nonsense"):
        result = namespace("mount", "-o", f"remount,{options}", namespace.mountpoint)
        assert (result.returncode, result.stderr.count("\n")) == (32, 1)
        assert namespace.mounted(namespace.mountpoint) == before


def test_second_memfs_on_a_mountpoint_is_refused(namespace: Namespace) -> None:
    assert namespace.mount("size=8m").returncode == 0
    result = namespace("mount", "-t", "fuse.memfs", "another", namespace.mountpoint)
    assert (result.returncode, "is mounted there already" in result.stderr) == (32, True)
    assert len(namespace("findmnt", "--noheadings", "--mountpoint", namespace.mountpoint).stdout.splitlines()) == 1


def test_fake_checks_and_does_not_mount(namespace: Namespace) -> None:
    command = ("mount", "--fake", "-t", "fuse.memfs", "-o")
    assert namespace(*command, "size=1m", "none", namespace.mountpoint).returncode == 0
    assert namespace(*command, "size=no", "none", namespace.mountpoint).returncode == 32
    assert namespace.mounted(namespace.mountpoint) == []


def test_mount_makes_the_mountpoint_and_mounts_in_another_namespace(namespace: Namespace, tmp_path: Path) -> None:
    new = tmp_path / "new" / "mnt"
    options = f"size=1m,socket={namespace.socket},X-mount.mkdir"
    assert namespace("mount", "-t", "fuse.memfs", "-o", options, "none", new).returncode == 0
    assert namespace.mounted(new)[2] == "fuse.memfs"
    assert namespace("umount", new).returncode == 0


#: A process in a mount namespace of its own: with the same root, with another, or in a user namespace
ELSEWHERE = {
    "ours": "mount -t tmpfs tmpfs {tmp} && echo ready && exec cat",
    "another root": (
        "mount --rbind {tmp} {tmp} && cd {tmp} && mkdir old && pivot_root . old"
        " && export LD_LIBRARY_PATH=/old/lib:/old/lib/x86_64-linux-gnu && echo ready && read line"
    ),
    "another user namespace": "echo ready && exec cat",
}


@pytest.mark.parametrize("where", ELSEWHERE)
@pytest.mark.parametrize("attached", [True, False])
def test_namespace_is_entered_only_if_its_programs_are_ours(
    can_mount: None, tmp_path: Path, where: str, attached: bool
) -> None:
    if os.geteuid():
        pytest.skip("needs root")
    skip_without_mount_namespace()
    helper, mountpoint, tmp = tmp_path / "helper", tmp_path / "mnt", tmp_path / "tmp"
    helper.write_text(HELPER)
    helper.chmod(0o755)
    for each in (mountpoint, tmp):
        each.mkdir()
    user = ["unshare", "--user", "--map-root-user"] if where == "another user namespace" else []
    command = [
        *user,
        *mount_namespace(tmp_path, "--propagation", "private"),
        "sh",
        "-c",
        ELSEWHERE[where].format(tmp=tmp),
    ]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        if process.stdout.readline() != "ready\n":
            pytest.skip("there can be no such namespace here")
        namespace = f"/proc/{process.pid}/ns/mnt"
        entering = [f"-N{namespace}"] if attached else ["-N", namespace]
        options = f"size=1m,socket={tmp_path / 'sock'}"
        result = run(helper, "none", mountpoint, *entering, "-o", options)
        mounted = Path(f"/proc/{process.pid}/mountinfo").read_text().count(f" {mountpoint} ")
        if where == "ours":
            assert (result.returncode, result.stderr, mounted) == (0, "", 1)
            assert run("nsenter", f"--mount={namespace}", "umount", mountpoint).returncode == 0
        else:
            assert (result.returncode, result.stderr.count("\n"), mounted) == (32, 1, 0)
            assert f"mount.fuse.memfs: {namespace}: " in result.stderr
            assert where in result.stderr
        process.communicate(timeout=STOP_TIMEOUT)


#: what mount(8) knows of itself, and says to every filesystem or to none
OF_MOUNT = [
    *("ro", "rw", "sync", "async", "dirsync", "lazytime", "nolazytime", "silent", "loud", "mand", "nomand"),
    *("atime", "noatime", "relatime", "norelatime", "strictatime", "nostrictatime", "diratime", "nodiratime"),
    *("suid", "nosuid", "dev", "nodev", "exec", "noexec", "nosymfollow", "iversion", "noiversion"),
    *("auto", "noauto", "nofail", "_netdev", "user", "nouser", "users", "owner", "group", "defaults"),
    *(
        "comment=x",
        "x-y",
        "x-y=z",
        "X-mount.mkdir",
        "shared",
        "private",
        "slave",
        "unbindable",
        "nonsense",
        "context=x",
    ),
]


def test_options_of_mount_do_what_they_do_to_a_tmpfs(namespace: Namespace, tmp_path: Path) -> None:
    beside = tmp_path / "beside"
    beside.mkdir()
    output = ("findmnt", "--noheadings", "--output", "SOURCE,VFS-OPTIONS,PROPAGATION,SIZE", "--mountpoint")
    for option in OF_MOUNT:
        options = f"size=8m,{option}"
        ours = namespace.mount(options)
        theirs = namespace("mount", "-t", "tmpfs", "-o", options, "none", beside)
        assert bool(ours.returncode) == bool(theirs.returncode), ours.stderr + theirs.stderr
        shown = [namespace(*output, path).stdout.split() for path in (namespace.mountpoint, beside)]
        assert shown[0] == shown[1], option
        namespace("umount", namespace.mountpoint, beside)


def test_umount_by_the_command_says_who_is_in_the_way(namespace: Namespace) -> None:
    assert namespace.mount("size=8m").returncode == 0
    holder = subprocess.Popen(
        [
            "nsenter",
            f"--mount=/proc/{namespace._holder.pid}/ns/mnt",
            "sh",
            "-c",
            f"cd {namespace.mountpoint}; echo; exec cat",
        ],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    assert holder.stdout is not None
    holder.stdout.readline()
    try:
        result = namespace(*memfs_command("umount", namespace.mountpoint))
        assert result.returncode == 1
        assert f"is in use by cat (pid {holder.pid})" in result.stderr
    finally:
        holder.communicate()
    assert namespace(*memfs_command("umount", namespace.mountpoint)).returncode == 0
    result = namespace(*memfs_command("umount", namespace.mountpoint))
    assert (result.returncode, "no memfs is mounted there" in result.stderr) == (1, True)
