"""Probes: diagnostics that run the model, one folder each."""
