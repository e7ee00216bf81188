"""memfs: a FUSE filesystem that is the memory backing store of virtual machines."""

from importlib.metadata import version
from typing import Final

__all__ = ["__version__"]

__version__: Final = version("memfs-kvmsim")
