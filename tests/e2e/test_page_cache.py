"""What the kernel's page cache has."""

from __future__ import annotations

import signal
import subprocess
import sys

import pytest

from memfs.contract.units import PAGE_SIZE

from .conftest import MountMemfs


@pytest.mark.parametrize("way", ["passthrough=off", "backing=memfd"])
def test_what_is_in_the_cache_is_read_without_asking_the_daemon(mount_memfs: MountMemfs, way: str) -> None:
    """A write leaves it there, although it changes the time by which other filesystems know what is out of date."""
    memfs = mount_memfs(f"size=16m,{way}")
    path = memfs.path / "file"
    path.write_bytes(b"x" * 8 * PAGE_SIZE)
    reads = "import os, sys; fd = os.open(sys.argv[1], 2); os.pwrite(fd, b'y', 0); os.stat(sys.argv[1])"
    reads += "; print(flush=True); input(); print(os.pread(fd, 2, 0))"
    with subprocess.Popen(
        [sys.executable, "-c", reads, path], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as reader:
        assert reader.stdout is not None
        reader.stdout.readline()
        memfs.process.send_signal(signal.SIGSTOP)
        try:
            assert reader.communicate("now\n", timeout=20)[0] == "b'yx'\n"
        finally:
            memfs.process.send_signal(signal.SIGCONT)
