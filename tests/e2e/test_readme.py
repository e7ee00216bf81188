"""What README has a reader type does what README says."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from .tools import needs

ROOT = Path(__file__).parents[2]
BIN = Path(sys.executable).parent


@needs("fallocate")
def test_first_look_by_hand(can_mount: None, tmp_path: Path) -> None:
    if os.geteuid():
        pytest.skip("needs root")
    if not shutil.which("memfs", path=str(BIN)):
        pytest.skip("needs memfs in the environment's bin")
    section = (ROOT / "README.md").read_text().split("## A first look by hand")[1].split("\n## ")[0]
    typed = [
        line.replace("/mnt/guest", str(tmp_path / "guest")) for line in re.findall(r"^    \$ (.*)$", section, re.M)
    ]
    assert len(typed) > 7
    script = "\n".join(f"{line}\necho status $?" for line in ["set -m", *typed])
    done = subprocess.run(
        ["bash", "-c", script],
        cwd=tmp_path,
        env=os.environ | {"PATH": f"{BIN}:{os.environ['PATH']}"},
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
    said = done.stdout + done.stderr
    failed = [code for code in re.findall(r"^status (\d+)$", done.stdout, re.M) if code != "0"]
    assert failed == ["1"], said  # cat of private memory
    assert "cat: private: Operation not permitted" in said
    assert not os.path.ismount(tmp_path / "guest")
