"""The programs that load adapters, one file each.

A consumer is one file here and one line below. A rule states in its module where it was read: project, file, function,
version and date.
"""

from lora_diag.diagnostics.portability.consumers import diffusers, kohya, llamacpp, mlx, peft, sglang, vllm
from lora_diag.diagnostics.portability.rules import Consumer

CONSUMERS: dict[str, Consumer] = {
    module.CONSUMER.name: module.CONSUMER for module in (peft, vllm, sglang, llamacpp, diffusers, kohya, mlx)
}
