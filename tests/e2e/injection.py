"""Faults that a process is to stumble over (memfs/contract/faults.py); the fixtures are in conftest.py."""

from __future__ import annotations

from pathlib import Path

from memfs.contract.faults import Kind, Point


class Injection:
    """What a process with this environment is to stumble over next."""

    def __init__(self, directory: Path) -> None:
        self.path = directory / "inject"
        self.environment = {"MEMFS_INJECT": str(self.path)}

    def arm(self, point: Point, kind: Kind = Kind.KILL, *, spared: int = 0) -> None:
        """Have it fail, wait or die when it comes to a point next, after it was spared so often."""
        written = self.path.with_suffix(".new")
        written.write_text(f"{point.value} {kind.value} {spared}")
        written.rename(self.path)

    def disarm(self) -> None:
        """Have it come by unharmed, if it has not come by."""
        self.path.unlink(missing_ok=True)

    @property
    def armed(self) -> bool:
        """Whether nobody has come by."""
        return self.path.exists()
