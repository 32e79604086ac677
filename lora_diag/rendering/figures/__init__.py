"""Layout and style of figures, and panels shared by several figures."""
