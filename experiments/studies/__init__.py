"""Studies, a command each: cells that are measured once, one JSON file, one figure, one paragraph for docs/studies.md.

A new one is a `cells.Study`, built from flags and passed to `cells.perform`; `toy` is the shortest example.
"""
