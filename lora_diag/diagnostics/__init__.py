"""Diagnostics, one folder each: a layer's ΔW → records → tables, figures, report sections."""
