"""What needs a model: the only room that imports transformers, peft or accelerate (extra ``[train]``).

The rule on the door: it gives gradients and records, and leaves what they mean to the other rooms.
"""
