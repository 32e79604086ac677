"""A Ray cluster of two nodes on this machine, in a process of its own: it says the address, then does as it is told.

``add`` starts the second node again, ``kill`` kills it as a power cut would, the end of the input ends all.
"""

import os
import sys

os.environ |= {"RAY_USAGE_STATS_ENABLED": "0", "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0"}

from ray.cluster_utils import Cluster

# Of each node: as little as Ray takes.
NODE = {"num_cpus": 1, "object_store_memory": 80 * 2**20, "include_log_monitor": False}
SECOND = {**NODE, "num_gpus": 1}  # a GPU in name alone


def main() -> None:
    cluster = Cluster(initialize_head=True, head_node_args={**NODE, "include_dashboard": False})
    second = cluster.add_node(**SECOND)
    tell(cluster.address)
    for line in sys.stdin:
        if line.strip() == "add":
            second = cluster.add_node(**SECOND)
        else:
            cluster.remove_node(second, allow_graceful=False)
        tell("done")
    cluster.shutdown()


def tell(words: str) -> None:
    sys.stdout.write(f"{words}\n")
    sys.stdout.flush()


if __name__ == "__main__":
    main()
