"""Policy and records → verdicts.

The rule on the door: pure. A rule that lacks what it needs is inconclusive, never passed.
"""

from lora_diag.gate.baseline import Stored, tightened
from lora_diag.gate.draft import draft
from lora_diag.gate.evidence import Source, checked, read_source
from lora_diag.gate.judge import judge
from lora_diag.gate.policy import Policy
from lora_diag.gate.reading import read_policy
from lora_diag.gate.ready import READY, ready_policy

__all__ = [
    "READY",
    "Policy",
    "Source",
    "Stored",
    "checked",
    "draft",
    "judge",
    "read_policy",
    "read_source",
    "ready_policy",
    "tightened",
]
