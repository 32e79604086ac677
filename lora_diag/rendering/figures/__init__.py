"""Layout and style of figures, and the panels that several figures share."""
