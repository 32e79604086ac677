"""Decisions from records: one folder a command."""
