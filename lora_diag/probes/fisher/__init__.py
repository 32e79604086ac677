"""``probe fisher``: the Fisher information of what a truncation discards."""
