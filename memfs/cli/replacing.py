"""Files that are replaced at once: who reads one sees what was there before, or all of what is there now."""

from __future__ import annotations

import os
import tempfile


def replace(path: str, content: bytes) -> None:
    """Have a file be this, with mode 0644. Raises OSError."""
    directory, name = os.path.split(os.path.abspath(path))
    try:
        file = tempfile.NamedTemporaryFile(dir=directory, prefix=f".{name[:32]}.", delete=False)  # noqa: SIM115
    except OSError as error:
        raise OSError(error.errno, error.strerror, path) from error
    with file:
        try:
            file.write(content)
            os.fchmod(file.fileno(), 0o644)
            file.flush()
            os.replace(file.name, path)
        except BaseException:
            os.unlink(file.name)
            raise
