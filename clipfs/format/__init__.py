"""The `.clip` file: its header, sections and tables, how it is written, checked and read."""
