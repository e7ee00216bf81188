"""What a memfs says of itself to those who watch it, and what each of them may see."""

from __future__ import annotations

import json
import os
from typing import Any

import pytest

from memfs.contract.protocol.messages import Registered
from memfs.contract.units import PageIndex, PageRange

from .conftest import Memfs, MountMemfs, memfs_command
from .owner import connected, shell
from .tools import skip_without

ALICE = 12001


@pytest.fixture
def shared_mount(mount_memfs: MountMemfs) -> Memfs:
    """A memfs that other users may use."""
    if os.geteuid() != 0:
        pytest.skip("acts as several users, so it needs root")
    memfs = mount_memfs("size=64m,allow_other")
    for directory in memfs.path.parents:  # pytest's are its user's only
        if directory.stat().st_uid == os.geteuid() and directory.stat().st_mode & 0o777 == 0o700:
            directory.chmod(0o711)
    return memfs


def alice(*command: str) -> list[str]:
    """Return a command that runs another as a user without rights."""
    return ["setpriv", f"--reuid={ALICE}", f"--regid={ALICE}", "--clear-groups", *command]


async def state(memfs: Memfs, *command: str) -> dict[str, Any]:
    """Return the state of a mount as who runs a command is told."""
    result = await shell(*command, cwd=memfs.path)
    assert result.returncode == 0, result.stderr
    said: dict[str, Any] = json.loads(result.stdout)
    return said


async def test_owners_of_others_are_seen_by_root_only(shared_mount: Memfs) -> None:
    skip_without("setpriv", "getfattr")
    ask = ["getfattr", "--only-values", "-n", "user.memfs.stat", "."]
    (shared_mount.path / "of-root").touch(0o600)
    async with connected(shared_mount.socket) as owner:
        assert isinstance(await owner.register(shared_mount.path / "of-root"), Registered)
        seen, unseen = await state(shared_mount, *ask), await state(shared_mount, *alice(*ask))
    assert [(each["uid"], len(each["files"])) for each in seen["registry"]] == [(0, 1)]
    assert (unseen["owners"], unseen["registry"]) == (1, [])


async def test_locked_pages_are_seen_by_who_may_read_the_file(shared_mount: Memfs) -> None:
    skip_without("setpriv", "getfattr")
    ask = ["getfattr", "--only-values", "-n", "user.memfs.locks", "private"]
    created = await shell(
        *memfs_command("create", "--seals", "guest", "--size", "1M", "private"), cwd=shared_mount.path
    )
    assert created.returncode == 0
    assert await state(shared_mount, *ask) == {"owner": None, "locked": 0, "runs": []}
    async with connected(shared_mount.socket) as owner:
        registered = await owner.register(shared_mount.path / "private")
        assert isinstance(registered, Registered)
        for start, end in ((3, 5), (8, 9)):
            pages = PageRange(PageIndex(start), PageIndex(end))
            await owner.client.get_pfn(registered.file, pages, alloc=True, lock=True)
        said = await state(shared_mount, *ask)
        assert (said["locked"], said["runs"]) == (3, [[3, 5], [8, 9]])
        refused = await shell(*alice(*ask), cwd=shared_mount.path)
    assert refused.returncode != 0
    assert b"Permission denied" in refused.stderr
