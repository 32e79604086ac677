"""``gate``: a policy and records → verdicts. A rule without the records it needs is inconclusive."""
