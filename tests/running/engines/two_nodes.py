"""A Ray cluster of two nodes on this machine, in a separate process: it prints the address, then
follows commands.

``add`` starts the second node again, ``kill`` kills it as a power cut would, the end of the input
ends all.
"""

import os
import sys

os.environ |= {
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    # A node that answers late is not dead, and one that is dead is looked for often.
    "RAY_health_check_timeout_ms": "120000",
    "RAY_health_check_period_ms": "1000",
    "RAY_worker_register_timeout_seconds": "600",
    "RAY_raylet_start_wait_time_s": "600",
    "RAY_NUM_REDIS_GET_RETRIES": "600",
}

from ray._private.node import Node
from ray.cluster_utils import Cluster

TIMES = 5
# Of each node: as little as Ray takes.
NODE = {"num_cpus": 1, "object_store_memory": 80 * 2**20, "include_log_monitor": False}
SECOND = {**NODE, "num_gpus": 1}  # a GPU in name alone


def main() -> None:
    cluster = started()
    second = added(cluster)
    tell(cluster.address)
    for line in sys.stdin:
        if line.strip() == "add":
            second = added(cluster)
        else:
            cluster.remove_node(second, allow_graceful=False)
        tell("done")
    cluster.shutdown()


def started() -> Cluster:
    """A cluster whose head is there; a raylet gives up where its agent takes more than 15 s to
    start, so try again.
    """
    for _ in range(TIMES):
        cluster = Cluster(
            initialize_head=True, head_node_args={**NODE, "include_dashboard": False, "wait": False}
        )
        if stands(cluster, cluster.head_node):
            return cluster
        cluster.shutdown()
    raise SystemExit("Ray's head died at its start again and again")


def added(cluster: Cluster) -> Node:
    for _ in range(TIMES):
        second = cluster.add_node(**SECOND, wait=False)  # which would wait for no more than 30 s
        if stands(cluster, second):
            return second
        cluster.remove_node(second, allow_graceful=False)
    raise SystemExit("Ray's second node died at its start again and again")


def stands(cluster: Cluster, node: Node) -> bool:
    """Wait until a node is there, or one of its processes died."""
    while node.remaining_processes_alive():
        try:
            cluster.wait_for_nodes(timeout=1)
        except TimeoutError:
            continue
        return node.remaining_processes_alive()
    return False


def tell(words: str) -> None:
    sys.stdout.write(f"{words}\n")
    sys.stdout.flush()


if __name__ == "__main__":
    main()
