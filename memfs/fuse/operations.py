"""What pyfuse3 is told of this filesystem: its features, for INIT. The channel answers all else (opcodes.py)."""

from __future__ import annotations

import pyfuse3


class Operations(pyfuse3.Operations):
    """Nothing but features: no operation is ever called."""

    supports_dot_lookup = True
    enable_writeback_cache = False
    enable_acl = True
