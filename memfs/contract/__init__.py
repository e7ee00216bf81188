"""The contract between memfs and kvmsim: what both processes must agree on, and small helpers that both use.

It imports nothing else of memfs or kvmsim, and is all that kvmsim imports of memfs.
"""
