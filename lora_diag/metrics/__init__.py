"""Singular values, norms, angles and losses → numbers, with NumPy and SciPy only; independent of
names and files.
"""
