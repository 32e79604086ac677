"""``allocate``: ranks under a budget, with a certificate."""
