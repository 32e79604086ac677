"""Records → decisions: how to spend a rank budget, what it costs, what to do next.

The rule on the door: pure functions of records and numbers, with NumPy and SciPy only. Nothing here opens a checkpoint,
measures, prints or writes.
"""
