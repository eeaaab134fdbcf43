"""EROFS: the structures on disk, writing them and reading them."""
