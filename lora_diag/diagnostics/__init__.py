"""Diagnostics: one folder each. A layer's ΔW → records → tables, figures, sections of a report."""
