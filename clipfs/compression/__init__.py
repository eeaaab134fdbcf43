"""Compressed streams: where they can be entered, and what comes out from there."""
