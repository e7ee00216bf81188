"""`make bench` leaves nothing mounted and nothing running, however it ends."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from .conftest import interruptible

ROOT = Path(__file__).parents[2]


def mounts(directory: Path) -> list[str]:
    """Return the mountpoints below a directory."""
    points = [line.split()[1] for line in Path("/proc/self/mounts").read_text().splitlines()]
    return [point for point in points if Path(point).is_relative_to(directory)]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_nothing_is_left_when_it_is_told_to_end(can_mount: None, tmp_path: Path, number: signal.Signals) -> None:
    if os.geteuid() != 0:
        pytest.skip("mounts a tmpfs to measure beside, so it needs root")
    command = [sys.executable, "-m", "bench", "--quick", "--only", "filesystem"]
    environment = {**os.environ, "TMPDIR": str(tmp_path)}
    with subprocess.Popen(
        command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, preexec_fn=interruptible
    ) as process:
        try:
            deadline = time.monotonic() + 60
            while len(mounts(tmp_path)) < 4:
                assert process.poll() is None, process.communicate()[0]
                assert time.monotonic() < deadline, "it does not mount"
                time.sleep(0.05)
            process.send_signal(number)
            output, _ = process.communicate(timeout=60)
            assert process.returncode == 128 + number, output
            assert mounts(tmp_path) == []
            assert list(tmp_path.iterdir()) == []
        finally:
            process.kill()
            for point in reversed(mounts(tmp_path)):
                subprocess.run(["umount", "--lazy", point], check=False)
