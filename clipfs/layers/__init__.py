"""Layers of an image: from a tar stream or a table of contents to one tree of inodes."""
