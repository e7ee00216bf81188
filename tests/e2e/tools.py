"""Programs that tests run on a mount and that a machine may lack; a test skips, with the reason, where one is missing.

`install-system-packages test` installs them, so that `make test` skips nothing on Debian.
"""

from __future__ import annotations

import os
import re
import shutil
import sys
from pathlib import Path
from typing import Final

import pytest

from .conftest import run

#: Program -> the Debian package it is in
PACKAGES: Final = {
    "busybox": "busybox-static",
    "cc": "gcc",
    "chromedriver": "chromium-driver",
    "chromium": "chromium",
    "chattr": "e2fsprogs",
    "lsattr": "e2fsprogs",
    "getfacl": "acl",
    "setfacl": "acl",
    "getfattr": "attr",
    "setfattr": "attr",
    "bwrap": "bubblewrap",
    "fio": "fio",
    "libvirtd": "libvirt-daemon-system",
    "virsh": "libvirt-clients",
    "virtiofsd": "qemu-system-common",
    "fusermount3": "fuse3",
    "stress-ng": "stress-ng",
    "findmnt": "util-linux",
    "man": "man-db",
    "nsenter": "util-linux",
    "qemu-system-x86_64": "qemu-system-x86",
    "socat": "socat",
    "xz": "xz-utils",
    "pgrep": "procps",
    "promtool": "prometheus",
    "setpriv": "util-linux",
    "systemd-analyze": "systemd",
    "systemd-socket-activate": "systemd",
    "unshare": "util-linux",
    "valgrind": "valgrind",
}

#: Where programs are that people do not run by themselves
OTHER_PLACES: Final = "/usr/sbin:/usr/lib/qemu:/usr/libexec"

#: The library that sets the clock of one process only (Debian package libfaketime)
FAKETIME: Final = next(Path("/usr/lib").glob("*/faketime/libfaketime.so.1"), None)


def missing(*tools: str) -> str:
    """Return which of the programs are not installed, as a sentence; empty if all are."""
    absent = [f"{tool} (Debian package {PACKAGES[tool]})" for tool in tools if not _is_there(tool)]
    return f"not installed: {', '.join(absent)}" if absent else ""


def _is_there(tool: str) -> bool:
    return shutil.which(tool) is not None or shutil.which(tool, path=OTHER_PLACES) is not None


def needs(*tools: str) -> pytest.MarkDecorator:
    """Return the mark that skips a test where one of the programs it runs is missing."""
    return pytest.mark.skipif(bool(missing(*tools)), reason=missing(*tools))


def skip_without(*tools: str) -> None:
    """Skip the test that is running if one of the programs is missing."""
    if reason := missing(*tools):
        pytest.skip(reason)


def skip_without_mount_namespace() -> None:
    """Skip the test that is running where unshare(1) cannot make one, as in a plain chroot."""
    skip_without("unshare")
    result = run("unshare", "--mount", "true")
    if result.returncode:
        pytest.skip(f"no mount namespace of our own: {result.stderr.strip()}")


def skip_unless_others_run_memfs(*become: str) -> None:
    """Skip the test that is running if a command that becomes another user cannot run memfs from this directory."""
    result = run(*become, sys.executable, "-m", "memfs", "--version")
    if result.returncode:
        pytest.skip(f"other users cannot run memfs from here: {result.stderr.strip()}")


def as_user(user: int) -> list[str]:
    """Return a command that runs another as a user of no groups but the one of the same number."""
    return ["setpriv", f"--reuid={user}", f"--regid={user}", "--clear-groups"]


def open_to_all(path: Path) -> None:
    """Have every user get to a path that is below pytest's directories, which are their user's only."""
    for directory in path.parents:
        if directory.stat().st_uid == os.geteuid() and directory.stat().st_mode & 0o777 == 0o700:
            directory.chmod(0o711)


#: in a new mount namespace: detach what is mounted of memfs, but for what lies below $0; then run a command
_DETACH = """for at in $(awk '$3 == "fuse.memfs" { print $2 }' /proc/self/mounts); do
    case $at in "$0"/*) ;; *) umount --lazy "$at" ;; esac
done
exec "$@"
"""


def mount_namespace(own: Path, *options: str) -> list[str]:
    """Return a command that runs another in a mount namespace, where of all memfs only those below `own` are mounted.

    A memfs ends when nobody has it mounted any more, so a copy would keep that of another test. With `options` the
    mounts must not be shared, or they would be unmounted everywhere. Skips the test where there can be none.
    """
    skip_without_mount_namespace()
    return ["unshare", "--mount", *options, "sh", "-c", _DETACH, str(own)]


def tools_in(script: str) -> list[str]:
    """Return which of the programs a shell script calls."""
    return [tool for tool in PACKAGES if re.search(rf"(?<![\w-]){tool}(?![\w-])", script)]
