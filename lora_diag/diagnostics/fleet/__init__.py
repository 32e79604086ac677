"""``fleet``: many adapters, compared with each other."""
