"""What a guide in docs/guides has its reader type does what the guide says (guides.py says how it is run).

Those that need programs which take long to install or to run are for `make guides-test`.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import pytest

from .guides import ROOT, run_guide
from .tools import skip_without, skip_without_mount_namespace


@dataclass(frozen=True)
class Guide:
    """What it takes to run a guide."""

    needs: tuple[str, ...] = ()
    heavy: bool = False


GUIDES: Final = {
    "bubblewrap": Guide(("bwrap", "pgrep")),
    "kubernetes": Guide(),
    "libvirt": Guide(("libvirtd", "virsh", "qemu-system-x86_64", "pgrep"), heavy=True),
    "snapshots": Guide(),
    "virtiofsd": Guide(("virtiofsd", "qemu-system-x86_64", "pgrep", "xz"), heavy=True),
    "owner": Guide(("cc",)),
    "userfaultfd": Guide(("cc",)),
    "qemu": Guide(("qemu-system-x86_64", "socat", "pgrep", "xz"), heavy=True),
}


def test_every_guide_is_run() -> None:
    by_deb_check = {"fresh-debian"}
    assert {path.stem for path in (ROOT / "docs" / "guides").glob("*.md")} == GUIDES.keys() | by_deb_check


@pytest.mark.timeout(600)
@pytest.mark.parametrize("name", GUIDES)
def test_guide(can_mount: None, tmp_path: Path, name: str) -> None:
    guide = GUIDES[name]
    if guide.heavy and "MEMFS_TEST_GUIDES" not in os.environ:
        pytest.skip("make guides-test runs it")
    if os.geteuid():
        pytest.skip("needs root")
    skip_without(*guide.needs)
    skip_without_mount_namespace()
    run_guide((ROOT / "docs" / "guides" / f"{name}.md").read_text(), tmp_path, 600 if guide.heavy else 60)
