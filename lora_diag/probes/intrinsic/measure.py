"""``probe intrinsic``: measure the loss of training in random subspaces, θ = θ_0 + P·z, in full,
and by LoRA.

P is a Fastfood projection that is never materialized. This is the definition of the intrinsic
dimension by Li et al. 2018; Aghajanyan et al. 2020 add one scale per layer (SAID). Training in a
subspace leaves BASE's weights unchanged: the model is called with other weights.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal, Unpack

import torch
from torch import Tensor, nn
from torch.func import functional_call

from lora_diag.errors import Given, UsageError
from lora_diag.models.data import Texts
from lora_diag.models.losses import Losses, measure
from lora_diag.models.opening import Model
from lora_diag.models.training import (
    Cell,
    TrainingSettings,
    add_lora,
    count_trained,
    losses_after,
    train,
)
from lora_diag.probes.intrinsic import IntrinsicOptions
from lora_diag.probes.intrinsic.record import Intrinsic
from lora_diag.probes.intrinsic.show import Subject
from lora_diag.records import LeftOut, Results
from lora_diag.records.names import depth_of, tower_of
from lora_diag.running.layers import check_ranks
from lora_diag.running.options import show_options
from lora_diag.running.probing import SEQUENCES
from lora_diag.running.progress import RunRecords
from lora_diag.running.training_runs import Arm, TrainRun, Trial
from lora_diag.storage import open_checkpoint

Method = Literal["plain", "said"]

# Size of the factors of a Hadamard matrix: 2²² entries in blocks of 1024 took 38 ms of one core by
# additions of pairs, and 7, 9 and 12 ms by matrix products with factors of 16, 32 and 64.
FACTOR = 16

# Times of a step of full fine-tuning and of LoRA, in forward passes of its batch.
FULL_STEP, LORA_STEP = 3.1, 2.3
# Time of P·z and its gradient, in tokens of a forward pass: 6 s of a core for 135 M parameters.
PROJECTION = 1500
# Reductions of a run with default options.
REDUCTIONS = (
    ("repeats", 1),
    ("widen", 0),
    *SEQUENCES[:-2],
    ("ranks", (1, 8)),
    ("dims", (100, 1000, 10000)),
)
REDUCTIONS += (
    ("steps", 50),
    ("lr", (3e-3,)),
    ("full_lr", (3e-4,)),
    ("lora_lr", (3e-3,)),
    ("steps", 20),
)
REDUCTIONS += (SEQUENCES[-2], ("ranks", (1,)), ("steps", 10), SEQUENCES[-1])

# Change of a layer's scale in one step at the peak rate, independent of the learning rate of z.
SCALE_STEP = 0.01


def hadamard(x: Tensor) -> Tensor:
    """Return H·x for the rows of x, where H is the Hadamard matrix with entries ±1 in Sylvester's
    order.

    H of size b is a Kronecker product of small factors, each applied along its own axis, in O(b·log
    b) operations.

    Args:
        x: ``(q, b)``, b a power of two.

    Example:
        >>> hadamard(torch.eye(2)).tolist()
        [[1.0, 1.0], [1.0, -1.0]]
    """
    rows, size = x.shape
    done = 1
    while done < size:
        width = min(FACTOR, size // done)
        small = _make_hadamard(width).to(x)
        x = x.reshape(-1, width) @ small if done == 1 else small @ x.reshape(-1, width, done)
        done *= width
    return x.reshape(rows, size)


def _make_hadamard(size: int) -> Tensor:
    """Return the Hadamard matrix ``(size, size)`` of a power of two: H_1 = [1], H_2k = [[H_k, H_k],
    [H_k, −H_k]].
    """
    h = torch.ones(1, 1)
    while len(h) < size:
        h = torch.cat([torch.cat([h, h], 1), torch.cat([h, -h], 1)])
    return h


class Fastfood:
    r"""The rows of P that belong to one tensor: blocks M = H·G·Π·H·B of b × b, b the smallest power
    of two ≥ d.

    B are random signs, Π is a permutation, G are standard normal numbers, all fixed by the seed;
    memory is about five bytes per entry of the tensor. An entry of M has mean 0 and variance b, so
    that with the factor 1/√(b·D) the columns of P, over all D rows, have a mean square norm of 1.

    Args:
        size: Entries of the tensor, n.
        dim: d.
        total: Entries of all tensors, D.
        generator: Generator of the random numbers.
        device: Device that keeps them.

    Reference:
        Le, Sarlós and Smola 2013, "Fastfood"; Aghajanyan et al. 2020, section 3.
    """

    def __init__(
        self, size: int, dim: int, total: int, generator: torch.Generator, device: torch.device
    ) -> None:
        block = 1 << (dim - 1).bit_length()
        blocks = -(-size // block)
        signs = torch.randint(0, 2, (blocks, block), generator=generator, dtype=torch.int8) * 2 - 1
        self._signs = signs.to(device)
        self._order = torch.randperm(block, generator=generator).to(device)
        self._normal = torch.randn(blocks, block, generator=generator).to(device)
        self._size, self._factor = size, 1 / math.sqrt(block * total)

    def times(self, z: Tensor) -> Tensor:
        """Return the tensor's part of P·z, ``(n,)``, for z ``(d,)``; differentiable in z."""
        padded = nn.functional.pad(z, (0, self._signs.shape[1] - len(z)))
        mixed = hadamard(self._signs * padded).index_select(1, self._order)
        return hadamard(self._normal * mixed).reshape(-1)[: self._size] * self._factor


class Subspace(nn.Module):
    """A model with weights θ_0 + P·z, or θ_0 + λ_ℓ·P·z with one scale λ_ℓ per layer; only z and λ
    are trained.

    Args:
        inner: The model; its own parameters are constant.
        dim: d, the total number of trained parameters, including scales (``check_dim``).
        seed: Seed of P.
        method: ``plain`` or ``said``.
        lr: Peak learning rate of z, from which the step of the scales follows.
    """

    def __init__(self, inner: nn.Module, dim: int, seed: int, method: Method, lr: float) -> None:
        super().__init__()
        self.inner = inner
        parameters = dict(inner.named_parameters())
        total = sum(parameter.numel() for parameter in parameters.values())
        device = next(iter(parameters.values())).device
        generator = torch.Generator().manual_seed(seed)
        scales: dict[tuple[object, ...], int] = {}
        self._scale_of: dict[str, int] = {}
        self.scales: nn.Parameter | None = None
        if method == "said":
            for name in parameters:
                place = scales.setdefault(_make_scale_key(name), len(scales))
                self._scale_of[name] = place
            self.scales = nn.Parameter(torch.zeros(len(scales), device=device))
        z_dim = dim - len(scales)
        self._projections = {
            name: Fastfood(parameter.numel(), z_dim, total, generator, device)
            for name, parameter in parameters.items()
        }
        self.z = nn.Parameter(torch.zeros(z_dim, device=device))
        self._unit = SCALE_STEP / lr
        self._fixed: dict[str, Tensor] | None = None

    def weights(self) -> dict[str, Tensor]:
        """Return all weights by their names in the model."""
        tensors = {}
        for name, parameter in self.inner.named_parameters():
            change = self._projections[name].times(self.z)
            if self.scales is not None:
                change = change * (1 + self._unit * self.scales[self._scale_of[name]])
            tensors[name] = parameter + change.view_as(parameter)
        return tensors

    def fix(self) -> None:
        """Compute the weights once, for all later calls of the model."""
        with torch.no_grad():
            self._fixed = self.weights()

    def forward(self, **inputs: Any) -> Any:
        """Call the model with the weights of ``fix``, or without a call of that, of ``weights``."""
        return functional_call(self.inner, self._fixed or self.weights(), (), inputs)


def check_dim(dim: int, total: int, layers: int) -> None:
    """Check that a dimension is at most the number ``total`` of parameters and above the number
    ``layers`` of scales.

    Raises:
        UsageError: The dimension is too large or too small.
    """
    if dim > total:
        raise UsageError(
            Given("dims", dim), f"the model has only {total} parameters", "use smaller dimensions"
        )
    if dim <= layers:
        raise UsageError(
            Given("dims", dim),
            f"$projection said trains {layers} scales, one per layer",
            "d must be larger",
        )


def count_scales(module: nn.Module) -> int:
    """Return the number of scales of SAID: one per block, and one for every parameter tensor
    outside the blocks.
    """
    return len({_make_scale_key(name) for name, _ in module.named_parameters()})


def _make_scale_key(name: str) -> tuple[object, ...]:
    """Return the key that a weight has in common with those of its scale: its block, or its name
    outside the blocks.
    """
    depth = depth_of(name)
    if depth is None:
        return (name,)
    return (*tower_of(name), depth)


def rate_of(pace: float, dim: int, total: int) -> float:
    """Return the rate at which a step of Adam on z moves θ as far as a step of rate ``pace`` on θ:
    pace·√(D/d).

    A step of Adam changes each parameter by about its rate, and P preserves norms: ‖Δθ‖ is rate·√d
    against pace·√D.

    >>> rate_of(1e-4, 100, 1_000_000)
    0.01
    """
    return pace * math.sqrt(total / dim)


@dataclass(frozen=True, slots=True)
class IntrinsicRun:
    """One training run.

    Args:
        subject: The trained parameters: all weights (``full``), z in a ``subspace``, or ``lora``'s
            factors.
        size: d or r; None for all weights.
        rate: Learning rate; for a subspace the equivalent rate of full fine-tuning.
        seed: Seed of P, of the initial factors, and of dropout if BASE has it.
        method: Projection of the subspace.
        total: Number of parameters of BASE.
    """

    subject: Subject
    size: int | None
    rate: float
    seed: int
    method: Method
    total: int

    @property
    def dim(self) -> int | None:
        """Dimension of a subspace; None for other runs."""
        return self.size if self.subject == "subspace" else None

    @property
    def rank(self) -> int | None:
        """Rank of a LoRA; None for other runs."""
        return self.size if self.subject == "lora" else None

    @property
    def lr(self) -> float:
        """Peak learning rate of Adam."""
        return self.rate if self.dim is None else rate_of(self.rate, self.dim, self.total)

    @property
    def fields(self) -> dict[str, Any]:
        """Fields that identify the records of the run."""
        return {
            "subject": self.subject,
            "dim": self.dim,
            "rank": self.rank,
            "lr": self.lr,
            "seed": self.seed,
        }

    @property
    def label(self) -> str:
        """Label of the run: size, learning rate and seed."""
        sizes = {"full": "full", "subspace": f"d={self.size}", "lora": f"r={self.size}"}
        return f"{sizes[self.subject]} lr={self.lr:.3g} seed {self.seed}"


@show_options
def probe_intrinsic(base: Path | str, **options: Unpack[IntrinsicOptions]) -> Results[Any]:
    r"""Train BASE in random subspaces of d dimensions, in full, and by LoRA, and compare the
    losses.

    θ = θ_0 + P·z with z ∈ R^d trained and P a fixed random D × d projection (Fastfood, never
    materialized); ``said`` adds one trained scale per layer. All runs have the same batches in the
    same order and the same number of steps. Each size tries all its learning rates with the first
    seed; the best on the first evaluation set is run with the other seeds.

    Args:
        base: Base model: a folder that transformers can open, or a Hub id.
        data: Training text, JSONL or data set.
        eval: Held-out files of the same distribution; the first decides on learning rates.
        shifted: Files of another distribution.
        dims: Dimensions d.
        projection: ``did`` (Li et al. 2018) or ``said`` (Aghajanyan et al. 2020).
        share: Fraction of full fine-tuning's gain over BASE to reach.
        ranks: Ranks of LoRAs for comparison; may be empty.
        lr: Learning rates of the subspaces as equivalent rates of full fine-tuning: z has the
            rate pace·√(D/d), at which a step of Adam moves the weights as far.
        full_lr: Learning rates of full fine-tuning.
        lora_lr: Learning rates of LoRA.
        steps: Number of updates of a run.
        repeats: Number of runs of each size at its best rate; they differ in P or in the initial
            factors.
        **options: ``IntrinsicOptions``.

    Returns:
        The records are in ``whole``: BASE's losses, and those of every run, on each set.

    Raises:
        UsageError: An option is invalid, ``dtype`` is not ``float32`` (others lose the steps of
            full fine-tuning to rounding), BASE is an adapter, the training text is also an
            evaluation set, the output can be neither replaced nor resumed, or the extra ``train``,
            or ``datasets`` for a data set, is not installed.
        InputError: An input cannot be read or the output written, or the model cannot be opened or
            adapted.

    Reference:
        Li, Farkhoor, Liu and Yosinski 2018, arXiv:1804.08838; Aghajanyan, Zettlemoyer and Gupta
        2020, arXiv:2012.13255.

    Example:
        >>> found = probe_intrinsic(
        ...     "sample_checkpoints/base",  # doctest: +SKIP
        ...     data="train.txt",
        ...     eval=["held_out.txt"],
        ...     dims=[10, 100],
        ...     steps=50,
        ... )
        >>> [(record.subject, record.loss) for record in found.whole]  # doctest: +SKIP
    """
    run = TrainRun("probe intrinsic", options, IntrinsicOptions)
    options = run.options
    method: Method = "said" if options["projection"] == "said" else "plain"
    check_ranks(options["ranks"] or [1])
    if options["dtype"] != "float32":
        raise UsageError(
            Given("dtype", options["dtype"]),
            "rounds away most steps of full fine-tuning, the reference of the measurement",
            "use float32",
        )
    run.check_files(base)
    model = run.open(base)
    total = sum(parameter.numel() for parameter in model.module.parameters())
    for dim in options["dims"]:
        check_dim(dim, total, count_scales(model.module) if method == "said" else 0)
    run.read_all()

    run.fit_runs(partial(_count_tokens, run), REDUCTIONS)
    lora_ranks = sorted(set(options["ranks"]))
    settings = {
        "dims": sorted(set(options["dims"])),
        "projection": method,
        "share": options["share"],
        "ranks": lora_ranks,
        "lr": sorted(set(options["lr"])),
        "full_lr": sorted(set(options["full_lr"])),
        "lora_lr": sorted(set(options["lora_lr"])),
        **run.training_settings(),
        "params": total,
        "scale_step": SCALE_STEP if method == "said" else None,
    }

    def measure_missing(run_records: RunRecords[Any]) -> list[LeftOut]:
        plan = run.plan_runs(run_records)

        def make_arm(subject: Subject, sizes: Sequence[int | None], rates: str) -> Arm:
            def make_trial(size: int | None, rate: float, seed: int) -> Trial:
                cell = IntrinsicRun(subject, size, rate, seed, method, total)
                return Trial(cell.fields, cell.label, partial(_train_cell, model, cell))

            return Arm(tuple(sizes), tuple(settings[rates]), make_trial)

        arms = {
            "of full fine-tuning": make_arm("full", [None], "full_lr"),
            "in subspaces": make_arm("subspace", settings["dims"], "lr"),
        }
        if lora_ranks:
            arms["of LoRA"] = make_arm("lora", lora_ranks, "lora_lr")
        # Copy, gradients and Adam's two moments of all weights; a subspace holds P, weights in use
        # and their gradients.
        methods = {name: [arm] for name, arm in arms.items()}
        plan.report_cost(methods, bases=not plan.has(subject="base"), extra_bytes=16 * total)
        plan.measure_base(model, partial(_record, cell=None, params=0, train_loss=None))
        for arm in arms.values():
            plan.run(arm)
        return []

    return run.over(run.inputs(open_checkpoint(base)), settings, measure_missing)


def _count_tokens(run: TrainRun[IntrinsicOptions]) -> float:
    """Count the tokens of all training, as forward passes."""
    options = run.options
    tokens = run.count_train_tokens(1, options["full_lr"], FULL_STEP)
    tokens += run.count_train_tokens(len(options["dims"]), options["lr"], FULL_STEP, PROJECTION)
    return tokens + run.count_train_tokens(len(options["ranks"]), options["lora_lr"], LORA_STEP)


def _train_cell(
    model: Model,
    cell: IntrinsicRun,
    training: TrainingSettings,
    sets: Sequence[Texts],
    after: Callable[[], None],
) -> list[Intrinsic]:
    """Train one run, and return one record per set; BASE is unchanged afterwards."""
    as_cell = Cell(cell.rank, cell.lr, cell.seed, "full" if cell.rank is None else "lora")
    params = cell.dim or cell.total
    if cell.dim is None:
        by_set, train_loss = losses_after(model, as_cell, training, sets, after)
    else:
        torch.manual_seed(cell.seed)
        module = Subspace(model.module, cell.dim, cell.seed, cell.method, cell.lr)
        tuned = replace(model, module=module)
        try:
            train_loss = train(tuned, as_cell, training, after)
            module.eval()
            module.fix()
            by_set = [measure(tuned, texts, training.batch, after) for texts in sets]
        finally:
            model.module.eval()
    if cell.rank is not None:
        with add_lora(model, cell.rank, training.kind) as adapted:
            params = count_trained(adapted)
    return [
        _record(texts, losses, cell, params, train_loss)
        for texts, losses in zip(sets, by_set, strict=True)
    ]


def _record(
    texts: Texts, losses: Losses, cell: IntrinsicRun | None, params: int, train_loss: float | None
) -> Intrinsic:
    return Intrinsic(
        **losses.fields_of_run(texts, train_loss),
        **(cell.fields if cell else {"subject": "base"}),
        params=params,
        pace=cell.rate if cell and cell.rank is None else None,
    )
