"""The policies of the package."""

from __future__ import annotations

from importlib.resources import files

from lora_diag.decisions.gate.policy import READY, Policy
from lora_diag.decisions.gate.reading import read_policy
from lora_diag.errors import UsageError


def ready_policy(name: str) -> Policy:
    """Return a policy of the package.

    Raises:
        UsageError: The name is unknown.

    Example:
        >>> ready_policy("adapter-basic").title
        'Is this adapter sound?'
    """
    if name not in READY:
        raise UsageError(
            f"--policy {name}: unknown; give one of {', '.join(READY)}, or a policy file without --policy: loradiag "
            f"gate {name} RESULTS"
        )
    text = files("lora_diag.decisions.gate").joinpath("policies", f"{name}.toml").read_text(encoding="utf-8")
    return read_policy(name, text).model_copy(update={"ready": True})
