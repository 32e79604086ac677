"""What runs a model (extra ``[train]``): opening it, data, losses, swapping weights, training."""
