"""``interference``: several updates of one base, their angles, sums and merges."""
