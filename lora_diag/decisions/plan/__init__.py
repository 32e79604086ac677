"""``plan``: parameters, memory and time of LoRA at each rank."""
