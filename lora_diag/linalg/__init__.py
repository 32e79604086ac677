"""torch matrices → norms, factors and bounds, one module per method; independent of names, files and LoRA."""
