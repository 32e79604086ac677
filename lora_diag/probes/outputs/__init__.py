"""``probe outputs``: held-out loss and outputs of adapters and of the full fine-tune."""
