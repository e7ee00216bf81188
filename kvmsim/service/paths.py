"""Where the service listens if nobody says otherwise: in the directory of the user's that ends with the session."""

from __future__ import annotations

import os


def default_socket() -> str:
    """Return the path: of root in /run, of others in XDG_RUNTIME_DIR."""
    directory = "/run" if os.geteuid() == 0 else os.environ.get("XDG_RUNTIME_DIR", f"/run/user/{os.geteuid()}")
    return f"{directory}/kvmsim.sock"
