"""Shared parts of runs: opening inputs, the loop over layers or training runs,
progress, resuming.
"""
