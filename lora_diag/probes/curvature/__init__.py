"""``probe curvature``: curvature of the loss along the update."""
