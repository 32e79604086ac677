"""Decisions from records, one folder per command."""
