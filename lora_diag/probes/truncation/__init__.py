"""``probe truncation``: held-out loss of the update truncated to each rank."""
