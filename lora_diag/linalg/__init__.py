"""torch matrices → norms, factors, bounds and estimates; independent of names, files and LoRA."""
