"""The units are what systemd takes, and leave little open. tests/e2e/test_package.py has a real systemd start them."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from .conftest import run
from .tools import needs

UNITS = Path(__file__).parents[2] / "contrib" / "systemd"
README = UNITS.parent / "README.md"
MOST_EXPOSED = 40  # tenths


@pytest.fixture
def service(tmp_path: Path) -> Path:
    """The service, of a program that there is."""
    service = tmp_path / "memfs@mnt-guest.service"
    service.write_text((UNITS / "memfs@.service").read_text().replace("/usr/bin/memfs", "/bin/true"))
    return service


@needs("systemd-analyze")
def test_units_are_understood(service: Path) -> None:
    for unit in (service, UNITS / "mnt-guest.mount"):
        result = run("systemd-analyze", "verify", "--man=no", unit)
        assert (result.returncode, result.stderr) == (0, "")


@needs("systemd-analyze")
def test_service_is_exposed_to_little_and_the_rest_is_explained(service: Path) -> None:
    command = ("systemd-analyze", "security", "--offline=yes", "--no-pager", f"--threshold={MOST_EXPOSED}", service)
    result = run(*command)
    assert result.returncode == 0, result.stdout[-200:]
    explained = README.read_text().split("What cannot be set")[1]
    named = set(re.findall(r"\w*@?\w+(?==)|CAP_\w+|@\w+", explained))
    for line in result.stdout.splitlines():
        name = line[2:].split("  ")[0].strip()
        if line.startswith("✗"):
            assert named & set(re.findall(r"@?\w+", name)) or "CAP_" in name, f"{name} is not explained"
