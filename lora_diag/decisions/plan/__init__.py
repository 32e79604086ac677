"""``plan``: parameters, memory and time of LoRA at each rank."""

from lora_diag.feature import Feature

FEATURE = Feature(__name__, "plan", command=".command:plan", functions=(".run:plan",))
