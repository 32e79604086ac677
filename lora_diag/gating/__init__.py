"""Policy and records → verdicts.

The rule on the door: pure. A rule that lacks what it needs is inconclusive, never passed.
"""

from lora_diag.gating.baseline import Stored, tightened
from lora_diag.gating.draft import draft
from lora_diag.gating.evidence import Present, Source, checked, read_source
from lora_diag.gating.judge import judge
from lora_diag.gating.policy import READY, Policy
from lora_diag.gating.reading import read_age, read_policy
from lora_diag.gating.ready import ready_policy

__all__ = [
    "READY",
    "Policy",
    "Present",
    "Source",
    "Stored",
    "checked",
    "draft",
    "judge",
    "read_age",
    "read_policy",
    "read_source",
    "ready_policy",
    "tightened",
]
