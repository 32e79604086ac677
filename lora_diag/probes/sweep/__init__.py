"""``probe sweep``: held-out loss after training at several ranks."""
