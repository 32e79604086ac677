"""Text, tables and figures of all commands' output. Independent of features."""
