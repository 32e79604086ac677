"""``spectrum``: singular values of ΔW, energy curves, and what the files' rounding hides."""
