"""Words → calls.

The rule on the door: the only room that prints or exits. A command is one small file here and one line in ``COMMANDS``;
torch is imported by the call, never by ``--help``.
"""

from lora_diag.cli.main import COMMANDS, app, main

__all__ = ["COMMANDS", "app", "main"]
