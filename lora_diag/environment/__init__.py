"""``doctor``: what this installation and this machine offer, and how to close each gap."""

from lora_diag.feature import Feature

FEATURE = Feature(__name__, "doctor", command=".command:doctor", needs_input=False)
