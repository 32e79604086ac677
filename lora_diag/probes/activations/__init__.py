"""``probe activations``: second moments of the layers' inputs."""
