"""Running models (extra ``[train]``): opening, data, losses, swapping weights, training."""
