"""``inspect``: the contents of a checkpoint, an adapter or a results file."""

from lora_diag.feature import Feature

FEATURE = Feature(__name__, "inspect", command=".command:inspect", functions=(".run:inspect",))
