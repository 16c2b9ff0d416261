"""Files of a run: checkpoints, the stored config, and writes that are atomic."""
