"""``probe activations``: second moments of the layers' inputs."""

from lora_diag.feature import Feature

FEATURE = Feature(__name__, "probe activations", command=".command:activations", functions=(".run:probe_activations",))
