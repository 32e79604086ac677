"""A study of a real language model of 135 M parameters with loradiag's own commands."""
