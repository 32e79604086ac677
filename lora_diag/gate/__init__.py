"""Policy and records → verdicts.

The rule on the door: pure. A rule that lacks what it needs is inconclusive, never passed.
"""
