"""Linux through Python: system calls that os lacks, and what /proc says of mounts and descriptors."""
