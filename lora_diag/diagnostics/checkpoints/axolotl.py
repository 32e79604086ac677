"""The plugin of axolotl that adds ``LoraMonitor`` to its trainer."""

from __future__ import annotations

from typing import Any

from lora_diag.diagnostics.checkpoints.monitor import LoraMonitor

try:
    from axolotl.integrations.base import BasePlugin
except ImportError:  # outside of axolotl, which finds the class by its name
    BasePlugin = object


class AxolotlPlugin(BasePlugin):  # type: ignore[misc]
    """Monitor a run of axolotl: ``plugins: [lora_diag.AxolotlPlugin]`` in its configuration.

    The records are in ``monitor.jsonl`` in ``output_dir``, the numbers in axolotl's log.
    ``lora_monitor: {every: 20}`` sets arguments of ``LoraMonitor``.
    """

    def get_input_args(self) -> str:
        """Return the name of the model of the plugin's own settings."""
        return "lora_diag.diagnostics.checkpoints.record.AxolotlArguments"

    def add_callbacks_post_trainer(self, cfg: Any, trainer: Any) -> list[LoraMonitor]:
        """Return the monitor."""
        return [LoraMonitor(**(cfg.lora_monitor or {})).log_to(trainer)]
