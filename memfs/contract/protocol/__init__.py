"""The protocol between memfs and the owners of files, from messages to a client."""
