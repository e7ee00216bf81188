"""The places in which a test of names runs."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from memfs.contract.sys.libc import mount, umount
from memfs.store.memfd_backing import MemfdBacking
from memfs.store.tmpfs_backing import TmpfsBacking
from tests.helpers import new_backing

from .tree.places import NR_INODES, SIZE, OnTmpfs, OnTree, Place


@pytest.fixture
def tree_place() -> Iterator[OnTree]:
    """A Tree on memfds, checked in the end."""
    place = OnTree(MemfdBacking(SIZE))
    yield place
    place.end()


@pytest.fixture
def tmpfs(tmp_path: Path) -> Iterator[Path]:
    """A real tmpfs that is as large as a `tree_place`."""
    try:
        mount("tmpfs", str(tmp_path), "tmpfs", 0, f"size={SIZE},nr_inodes={NR_INODES},mode=755")
    except OSError as error:
        pytest.skip(f"no tmpfs to compare with: {error.strerror}")
    umask = os.umask(0)
    try:
        yield tmp_path
    finally:
        os.umask(umask)
        umount(str(tmp_path))


@pytest.fixture(params=[MemfdBacking, TmpfsBacking, OnTmpfs], ids=["on memfds", "on tmpfs", "tmpfs"])
def place(request: pytest.FixtureRequest) -> Iterator[Place]:
    """A Tree on either backing, and then the tmpfs that says whether the test is right."""
    place = (
        OnTmpfs(request.getfixturevalue("tmpfs"))
        if request.param is OnTmpfs
        else OnTree(new_backing(request.param, SIZE))
    )
    try:
        yield place
    finally:
        place.end()
