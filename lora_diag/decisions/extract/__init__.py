"""``extract``: the best adapter of given ranks, written in PEFT's format."""
