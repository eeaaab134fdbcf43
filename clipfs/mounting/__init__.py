"""A `.clip` as a file system of this machine: views, sessions, processes."""
