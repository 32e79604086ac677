"""Text, tables and figures: what every command's output is made of. Knows no feature."""
