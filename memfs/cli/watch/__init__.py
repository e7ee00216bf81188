"""Views of what memfs's do: `memfs map`, `memfs top`, `memfs web`.

All have what they show from the same two places, which are open to anybody's programs: the state of a mount
(docs/stat.schema.json), and which pages of a file there are (SEEK_DATA, SEEK_HOLE). The daemon answers both as it
answers any request of that user, so nobody is shown what a shell would not show. Each look asks for a bounded part, and
what is longer is looked at bit by bit. Nothing is held open in between: who watches keeps nobody from unmounting.
"""
