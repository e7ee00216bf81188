"""The version of memfs and kvmsim, which pyproject.toml reads from here.

Rejected: to ask importlib.metadata, which takes longer to import than most commands take to run.
"""

from __future__ import annotations

from typing import Final

VERSION: Final = "0.1.0"
