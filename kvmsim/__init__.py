"""kvmsim: the KVM side of fd-based guest private memory, in userspace."""

from importlib.metadata import version
from typing import Final

__all__ = ["__version__"]

__version__: Final = version("memfs-kvmsim")
