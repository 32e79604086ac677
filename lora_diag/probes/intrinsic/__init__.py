"""``probe intrinsic``: how many trained parameters reach a share of the full gain."""
