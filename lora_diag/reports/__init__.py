"""Records → text or bytes.

The rule on the door: a report is a pure function of records. It never measures, prints, or opens a checkpoint, and it
imports neither torch nor typer. A report is one file here.
"""
