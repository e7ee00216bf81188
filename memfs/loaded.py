"""All code is loaded before the mount answers.

A module that is imported later is read from the disk in the event loop, and everybody waits for that; and by then its
file may be another version's, or out of reach, or lie on the mount itself. Libraries import parts of theirs where they
are first used (numpy.unique: all of numpy.ma, 11 ms), so this cannot be seen from the code. A mount with `--check`
says in the end what was imported late.
"""

from __future__ import annotations

import sys
from typing import Final


class Loaded:
    """What was loaded at one moment."""

    def __init__(self) -> None:
        self._modules: Final = frozenset(sys.modules)

    def check(self) -> None:
        """Raise AssertionError if something was imported since."""
        late = sorted(sys.modules.keys() - self._modules)
        assert not late, f"imported while the mount was served: {', '.join(late)}"
