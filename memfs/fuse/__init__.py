"""The kernel side of memfs: /dev/fuse, what pyfuse3 leaves out, and the mount itself."""
