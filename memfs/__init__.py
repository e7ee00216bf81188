"""memfs: a FUSE filesystem that is the memory backing store of virtual machines."""
