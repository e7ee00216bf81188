"""What trio does not have: polling many descriptors in one task, busy polling, and eager tasks."""
