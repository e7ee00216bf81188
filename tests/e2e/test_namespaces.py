"""Namespaces: memfs mounted in a user or pid namespace, owners that are in another one, and mounts with other ids."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from memfs.contract.protocol.messages import Registered

from .conftest import Memfs, MountMemfs, run, start_memfs
from .owner import connected
from .tools import mount_namespace, skip_without, skip_without_mount_namespace

#: Registers the file that is its descriptor 3, having moved to where the file is not mounted
REGISTER = """
import sys, trio
from memfs.contract.protocol.client import connect
async def main():
    async def hear(message): pass
    async with connect(sys.argv[1], "moved", hear) as client:
        registered, _ = await client.register(3)
        print(registered.ino)
trio.run(main)
"""


def test_owner_goes_on_in_a_container_that_it_entered_with_its_files_open(memfs: Memfs) -> None:
    skip_without_mount_namespace()
    path = memfs.path / "file"
    path.write_bytes(b"x")
    inside = f"umount -l {memfs.path}; exec {sys.executable} -c '{REGISTER}' {memfs.socket}"
    moved = f'exec 3<>{path}; exec unshare --mount sh -c "$0"'
    result = run(*mount_namespace(memfs.path.parent), "sh", "-c", moved, inside, cwd=Path(__file__).parents[2])
    assert (result.returncode, result.stdout) == (0, f"{path.stat().st_ino}\n"), result.stderr


async def test_daemon_in_another_pid_and_mount_namespace_has_owners_on_the_host(can_mount: None, shared: Path) -> None:
    skip_without_mount_namespace()
    unshare = ["unshare", "--mount", "--propagation", "unchanged", "--pid", "--fork", "--kill-child"]
    memfs = start_memfs(shared, "size=64m", within=unshare)
    try:
        (memfs.path / "file").write_bytes(b"x")
        async with connected(memfs.socket) as owner:
            assert isinstance(await owner.register(memfs.path / "file"), Registered)
        memfs.stop()
    finally:
        memfs.kill()


@pytest.fixture
def shared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A directory in which what is mounted in one mount namespace is mounted in all."""
    path = tmp_path_factory.mktemp("shared")
    if (result := run("mount", "--bind", "--make-shared", path, path)).returncode:
        pytest.skip(f"cannot share mounts: {result.stderr.strip()}")
    try:
        yield path
    finally:
        run("umount", "--lazy", path)


# -- idmapped mounts ---------------------------------------------------------------------------------------------------

#: What is done through a mount on which user 0 is 10000 to the filesystem and user 1000 is 11000
IDMAPPED = """
set -e; umask 022; cd $1
stat -c '%n %u:%g' . f
echo x > made; mkdir dir; ln -s made link; mkfifo fifo; stat -c '%n %u:%g' made dir link fifo
chown 1000:1000 made; stat -c '%n %u:%g' made
chmod 6755 made; setpriv --reuid 1000 --regid 1000 --clear-groups sh -c 'echo y >> made'; stat -c '%n %a' made
setpriv --reuid 1000 --regid 1000 --clear-groups touch f 2>/dev/null && echo may || echo "may not"
chown 1000 . ; setpriv --reuid 1000 --regid 1000 --clear-groups touch g; stat -c '%n %u:%g' g; chown 0 .
setfacl -m u:1000:rw dir; getfacl -nc dir
setfattr -n trusted.x -v 1 made; getfattr -d -m - made | grep -v '^#'
mv made moved; rm f g; ls
"""


@pytest.fixture
def idmapped(tmp_path_factory: pytest.TempPathFactory) -> Iterator[list[Path]]:
    """Directories on which filesystems are mounted again by a test; unmounted in the end."""
    directories = [tmp_path_factory.mktemp("idmapped") for _ in range(2)]
    try:
        yield directories
    finally:
        for each in directories:
            run("umount", "--lazy", each)


@pytest.mark.parametrize("passthrough", ["auto", "off"])
def test_idmapped_mount_is_as_tmpfs_s(
    mount_memfs: MountMemfs, tmpfs: Path, idmapped: list[Path], passthrough: str
) -> None:
    skip_without("setpriv", "setfacl", "getfacl", "setfattr", "getfattr")
    memfs = mount_memfs(f"size=64m,allow_other,suid,passthrough={passthrough}")
    told = []
    for original, again in zip((tmpfs, memfs.path), idmapped, strict=True):
        os.chown(original, 10000, 10000)
        (original / "f").touch()
        os.chown(original / "f", 10000, 10000)
        again.parent.chmod(0o755)
        _mount_idmapped(original, again)
        done = run("bash", "-c", IDMAPPED, "bash", again)
        assert done.returncode == 0, done.stderr
        told.append(
            (done.stdout, [(each.name, each.stat(follow_symlinks=False)[4:6]) for each in sorted(original.iterdir())])
        )
    assert told[1] == told[0]
    assert "made 1000:1000\nmade 755\nmay not\n" in told[0][0]


def _mount_idmapped(original: Path, again: Path) -> None:
    """Mount a directory again with ids from 10000 on as those from 0 on. Skips where that cannot be."""
    import ctypes

    libc = ctypes.CDLL(None, use_errno=True)
    sleeper = subprocess.Popen(["unshare", "--user", "sleep", "60"])
    try:
        namespace = Path(f"/proc/{sleeper.pid}/ns/user")
        while namespace.readlink() == Path("/proc/self/ns/user").readlink():
            if sleeper.poll() is not None:
                pytest.skip("no user namespace can be made, as in a plain chroot")
        for name in ("uid_map", "gid_map"):
            Path(f"/proc/{sleeper.pid}/{name}").write_text("10000 0 5000\n")
        fd = os.open(namespace, os.O_RDONLY)
        tree = libc.syscall(428, -100, os.fsencode(original), 1 | os.O_CLOEXEC)  # open_tree(OPEN_TREE_CLONE)
        attributes = (ctypes.c_uint64 * 4)(0x100000, 0, 0, fd)  # MOUNT_ATTR_IDMAP
        result = libc.syscall(442, tree, b"", 0x1000, attributes, ctypes.sizeof(attributes))  # mount_setattr
        if result:
            pytest.fail(f"{original}: {os.strerror(ctypes.get_errno())}")
        assert libc.syscall(429, tree, b"", -100, os.fsencode(again), 4) == 0  # move_mount
        os.close(tree)
        os.close(fd)
    finally:
        sleeper.kill()
        sleeper.wait()
