"""The VMM side: how exits are answered, and memory converted."""
