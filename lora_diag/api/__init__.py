"""The commands as functions: paths and options in, results out.

The rule on the door: a function here mirrors one command, joins the rooms that do its work, and neither prints nor
exits. It is what ``lora_diag.spectrum(...)`` is.
"""
