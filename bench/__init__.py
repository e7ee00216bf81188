"""`make bench`: how fast memfs is, each number beside its reference from the same run."""
