"""``intruders``: singular vectors of the tuned weights that the base does not have."""
