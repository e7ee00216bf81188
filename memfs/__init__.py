"""memfs: a FUSE filesystem that is the memory backing store of virtual machines."""

from memfs.contract.version import VERSION as __version__

__all__ = ["__version__"]
