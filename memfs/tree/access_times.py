"""When reading sets access times: relatime, noatime or strictatime, and nodiratime, as mount(8) has them.

Those of regular files are the backing's. What is said here goes for directories and symbolic links, of which the kernel
leaves access times to a FUSE server.
"""

from __future__ import annotations

from dataclasses import dataclass

from memfs.tree.inode import TimedInode


@dataclass(slots=True)
class AccessTimes:
    """What the mount says now; it can be mounted again with other options."""

    atime: str = "relatime"  #: relatime, noatime or strictatime
    diratime: bool = True  #: whether that goes for directories, too

    def read(self, inode: TimedInode) -> bool:
        """Set the access time of an inode that was read, if it is to be set. Returns whether it was."""
        if self.atime == "noatime" or not (self.diratime or not inode.is_dir):
            return False
        return inode.accessed(always=self.atime == "strictatime")
