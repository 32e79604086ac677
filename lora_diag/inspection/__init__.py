"""``inspect``: what a checkpoint, an adapter or a results file holds."""
