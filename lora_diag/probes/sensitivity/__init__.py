"""``probe sensitivity``: the gain of adapting one layer or module type alone."""
