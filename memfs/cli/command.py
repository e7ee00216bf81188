"""What the files that commands are in share: how a command is added to `memfs`, and what ends one."""

from __future__ import annotations

import argparse
from typing import TypeAlias

from memfs.contract.terminal import Parser

#: The commands of `memfs`, to which each file adds its own
Commands: TypeAlias = "argparse._SubParsersAction[Parser]"


class CommandError(Exception):
    """Why a command failed: one sentence."""
