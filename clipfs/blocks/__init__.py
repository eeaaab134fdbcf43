"""From addresses in an image's data space to bytes: which blocks (`plan`), from memory (`cache`), or fetched, decoded
and verified once for everybody who waits (`reader`). What happened is counted in `counters`."""
