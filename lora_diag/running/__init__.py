"""What runs have in common: opening inputs, the loop over layers or training runs, progress, resuming."""
