"""Where ``spectrum`` on a cluster stops scaling: the real scheduler on simulated nodes, with costs
measured here.

    python -m benchmarks.scaling    the tables of docs/explanation/scale.md

The scheduler (``running.engines.schedule``) decides as in a run; only time is simulated. A node
runs a task when it has the cores for it. Costs: ``linalg.methods`` on one core, and the fraction of
the eigenvalue solver that a second core speeds up (Amdahl). Not simulated: storage, memory
bandwidth shared by cores, nodes that fail.
"""

import heapq
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import product
from math import prod

import torch

from benchmarks.measure import machine, print_table
from lora_diag.decisions.plan.architectures import weights_of
from lora_diag.decisions.plan.cost import estimate_core_seconds, interpolate_cost
from lora_diag.decisions.plan.record import PlanRates
from lora_diag.linalg.methods import time_full, time_leading, time_pass
from lora_diag.running.engines.local import MachineLayout, layout_for
from lora_diag.running.engines.schedule import REACH, Batch, Capacity, batches, in_order

ORDERS = (256, 1024, 2048, 4096)
TOP = 64
VALUES = {None: "all values", TOP: f"`--top {TOP}`"}
# Seconds of the submitting program per Ray task, measured: see ``running.engines.schedule.BATCH``.
SUBMIT = 4e-4

# Sizes in the models' public configs.
LLAMA_70B = {"model_type": "llama", "hidden_size": 8192, "intermediate_size": 28672, "num_hidden_layers": 80,
             "num_attention_heads": 64, "num_key_value_heads": 8, "vocab_size": 128256}  # fmt: skip
KIMI_K2 = {"model_type": "deepseek_v3", "hidden_size": 7168, "intermediate_size": 18432, "moe_intermediate_size": 2048,
           "num_hidden_layers": 61, "first_k_dense_replace": 1, "n_routed_experts": 384, "n_shared_experts": 1,
           "num_attention_heads": 64, "num_key_value_heads": 64, "q_lora_rank": 1536, "kv_lora_rank": 512,
           "qk_nope_head_dim": 128, "qk_rope_head_dim": 64, "v_head_dim": 128, "vocab_size": 163840}  # fmt: skip
MODELS = {"Llama-3-70B": LLAMA_70B, "Kimi-K2 (1 T)": KIMI_K2}
CORES, NODES = 16, (1, 4, 16, 64, 256)
# Single machines: cores, and GB of --memory.
MACHINES = ((16, None), (16, 64), (64, None), (64, 256))


@dataclass(frozen=True)
class Task:
    """A matrix, as the scheduler sees it."""

    layer: str
    shape: tuple[int, int]

    @property
    def footprint(self) -> int:
        """Bytes of a running task, as ``deltas.footprint``."""
        return 4 * prod(self.shape) + 16 * min(self.shape) ** 2


@dataclass(frozen=True)
class Costs:
    """Measured costs on one core, and how they fall with more.

    Args:
        rates: Core-seconds on one core.
        parallel: Fraction of the eigenvalue solver's time that is divided by the number of cores.
    """

    rates: PlanRates
    parallel: float

    def seconds(self, task: Task, threads: int, top: int | None) -> float:
        """Return the seconds of a task on some cores."""
        total = estimate_core_seconds(self.rates, task.shape, top)
        serial = 0.0
        if top is None or min(task.shape) < self.rates.few_from:
            serial = (1 - self.parallel) * interpolate_cost(
                self.rates.eigen, min(task.shape), beyond=3
            )
        return serial + (total - serial) / threads


def measured() -> Costs:
    """Time the kernels on one core, and the largest eigenvalue problem on two."""
    torch.set_num_threads(1)
    full = {
        order: min(time_full(order) for _ in range(1 if order > 2048 else 3)) for order in ORDERS
    }
    few = {
        order: min(time_leading(order, TOP) for _ in range(2)) / order**2
        for order in ORDERS
        if order >= 1024
    }
    rates = PlanRates(
        cores=1,
        entry=min(time_pass(2048) for _ in range(3)) / 2048**2,
        product=full[4096][0] / 4096**3,
        eigen={order: values for order, (_, values) in full.items()},
        few=few,
        few_from=1024,
    )
    torch.set_num_threads(2)
    both = time_full(4096)[1]
    torch.set_num_threads(1)
    parallel = min(1.0, max(0.0, 2 * (1 - both / full[4096][1])))
    return Costs(rates, parallel)


@dataclass
class Cluster:
    """Nodes in simulated time.

    Args:
        free: Free cores of every node.
        costs: Measured costs.
        tasks: All tasks.
        top: K; None for all values.
        submit: Seconds of the submitting program per batch.
    """

    free: list[int]
    costs: Costs
    tasks: Sequence[Task]
    top: int | None
    submit: float = SUBMIT
    now: float = 0.0
    queue: list[tuple[int, Batch]] = field(default_factory=list)
    running: list[tuple[float, int, int, Batch]] = field(default_factory=list)
    sent: int = 0

    def send(self, batch: Batch) -> int:
        self.now += self.submit
        self.sent += 1
        self.queue.append((self.sent, batch))
        self.start()
        return self.sent

    def start(self) -> None:
        """Start waiting batches, in the order in which they were sent, on nodes with enough free
        cores.
        """
        waiting: list[tuple[int, Batch]] = []
        for at, (ticket, batch) in enumerate(self.queue):
            node = max(range(len(self.free)), key=self.free.__getitem__)
            if not self.free[node]:
                waiting += self.queue[at:]
                break
            if self.free[node] < batch.threads:
                waiting.append((ticket, batch))
                continue
            self.free[node] -= batch.threads
            each = self.tasks[batch.start : batch.stop]
            seconds = sum(self.costs.seconds(task, batch.threads, self.top) for task in each)
            heapq.heappush(self.running, (self.now + seconds, ticket, node, batch))
        self.queue = waiting

    def fetch(self, _: Sequence[int]) -> Iterator[tuple[int, list[None]]]:
        end, ticket, node, batch = heapq.heappop(self.running)
        self.now = max(self.now, end)
        self.free[node] += batch.threads
        self.start()
        yield ticket, [None] * len(batch)


def simulate(
    tasks: Sequence[Task],
    nodes: int,
    cores: int,
    costs: Costs,
    top: int | None,
    layout: MachineLayout,
) -> float:
    """Return the simulated seconds of a run on a cluster of equal nodes."""
    cluster = Cluster([cores] * nodes, costs, tasks, top)
    plan = batches(tasks, lambda task: task.footprint, layout.threads, nodes * cores)
    room = Capacity(nodes * cores)
    for _ in in_order(
        plan, REACH * nodes * cores, lambda: room, cluster.send, cluster.fetch, lambda _: None
    ):  # type: ignore[arg-type]
        pass
    return cluster.now


def tasks_of(config: dict[str, object]) -> list[Task]:
    """Return the matrices of a model; an expert of a stack is one, its gate and up another."""
    result = []
    for name, shape in weights_of(config, "config.json"):
        if len(shape) == 2:
            result.append(Task(name, shape))
        elif len(shape) == 3:
            rows, columns = shape[1:]
            halves = 2 if "gate_up" in name else 1
            result += [
                Task(f"{name}[{at}]", (rows // halves, columns)) for at in range(halves * shape[0])
            ]
    return result


def tables(costs: Costs) -> None:
    """Print the table of models and nodes."""

    def rows() -> Iterator[list[str]]:
        for name, config in MODELS.items():
            tasks = tasks_of(config)
            layout = MachineLayout(
                CORES, layout_for(max(prod(task.shape) for task in tasks)).budget
            )
            for top, what in VALUES.items():
                alone = sum(costs.seconds(task, 1, top) for task in tasks)
                seconds = {
                    nodes: simulate(tasks, nodes, CORES, costs, top, layout) for nodes in NODES
                }
                yield [
                    name,
                    what,
                    *(
                        f"{s:.0f} s, {alone / (s * nodes * CORES):.0%}"
                        for nodes, s in seconds.items()
                    ),
                ]

    print_table(
        " | ".join(["model", "`spectrum`", *(f"{n} × {CORES} cores" for n in NODES)]), rows()
    )


def plan(costs: Costs) -> None:
    """Print the table of models and single machines."""

    def rows() -> Iterator[list[str]]:
        for name, config in MODELS.items():
            tasks = tasks_of(config)
            default = layout_for(max(prod(task.shape) for task in tasks)).budget
            size = sum(4 * prod(task.shape) for task in tasks)  # both sides in bf16
            for (top, what), (cores, memory) in product(VALUES.items(), MACHINES):
                layout = MachineLayout(cores, int(memory * 1e9) if memory else default)
                seconds = simulate(tasks, 1, cores, costs, top, layout)
                limit = f"`--memory {memory}GB`" if memory else f"default, {default / 1e9:.0f} GB"
                spent = [
                    f"{seconds / 60:.0f} min",
                    f"{seconds * cores / 3600:.2g}",
                    f"{size / seconds / 1e9:.2g} GB/s",
                ]
                yield [name, what, f"{cores} cores", limit, *spent]

    print_table("model | `spectrum` | machine | memory | time | core hours | reads", rows())


if __name__ == "__main__":
    start = time.perf_counter()
    costs = measured()
    print(f"{machine()}; measured in {time.perf_counter() - start:.0f} s: {costs}\n")
    tables(costs)
    plan(costs)
