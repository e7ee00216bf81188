"""The contract between memfs and kvmsim: what both processes must agree on, and small helpers that both use.

It imports nothing else of memfs or kvmsim, and is all that kvmsim imports of memfs. For programs of others the public
names are those exported here, the units, and by `memfs.contract.protocol`, the client; and `page_map.PageMapView`.
"""

from memfs.contract.units import PAGE_SIZE, ByteOffset, PageIndex, PageRange

__all__ = ["PAGE_SIZE", "ByteOffset", "PageIndex", "PageRange"]
