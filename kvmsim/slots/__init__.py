"""Memslots: which gfns lie on which file or mapping, by which rules, and what was written to them."""
