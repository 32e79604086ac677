"""Running models (extra ``[train]``): opening, data, losses, layer inputs, swapped weights,
training.
"""
