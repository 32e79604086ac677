"""One layer's ΔW: read in blocks, subtracted, weighted by a metric, with its rounding noise."""
