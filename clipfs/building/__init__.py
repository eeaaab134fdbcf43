"""From an image to a `.clip`, or to a directory: what reads images as a whole."""
