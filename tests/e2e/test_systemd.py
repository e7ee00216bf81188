"""The units are what systemd takes, and leave little open. tests/e2e/test_package.py has a real systemd start them."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from .conftest import run
from .tools import needs

UNITS = Path(__file__).parents[2] / "contrib" / "systemd"
README = UNITS.parent / "README.md"
SECURITY = ("systemd-analyze", "security", "--offline=yes", "--no-pager", "--threshold=39")  # tenths: below 4.0


def of_a_program_that_there_is(name: str, directory: Path, instance: str = "") -> Path:
    """Return a service for which nothing need be installed."""
    service = directory / name.replace("@", f"@{instance}")
    service.write_text((UNITS / name).read_text().replace("/usr/bin/memfs", "/bin/true"))
    return service


@pytest.fixture
def service(tmp_path: Path) -> Path:
    return of_a_program_that_there_is("memfs@.service", tmp_path, "mnt-guest")


@pytest.fixture
def metrics(tmp_path: Path) -> Path:
    return of_a_program_that_there_is("memfs-metrics.service", tmp_path)


@needs("systemd-analyze")
def test_units_are_understood(service: Path, metrics: Path) -> None:
    owners = service.with_suffix(".socket")
    owners.write_text((UNITS / "memfs@.socket").read_text())
    for unit in (service, owners, metrics, UNITS / "mnt-guest.mount"):
        result = run("systemd-analyze", "verify", "--man=no", unit)
        assert (result.returncode, result.stderr) == (0, "")


@needs("systemd-analyze")
def test_metrics_are_exposed_to_little(metrics: Path) -> None:
    result = run(*SECURITY, metrics)
    assert result.returncode == 0, result.stdout[-200:]


@needs("systemd-analyze")
def test_service_is_exposed_to_little_and_the_rest_is_explained(service: Path) -> None:
    result = run(*SECURITY, service)
    assert result.returncode == 0, result.stdout[-200:]
    explained = README.read_text().split("What cannot be set")[1]
    named = set(re.findall(r"\w*@?\w+(?==)|CAP_\w+|@\w+", explained))
    for line in result.stdout.splitlines():
        name = line[2:].split("  ")[0].strip()
        if line.startswith("✗"):
            assert named & set(re.findall(r"@?\w+", name)) or "CAP_" in name, f"{name} is not explained"
