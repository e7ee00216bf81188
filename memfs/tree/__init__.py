"""The namespace: inodes, names, extended attributes, ACLs and open files."""
