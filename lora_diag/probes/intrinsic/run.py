"""``probe intrinsic``: measure the loss of training in random subspaces."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Unpack

from lora_diag.checkpoints import open_checkpoint
from lora_diag.errors import UsageError
from lora_diag.models.data import Texts
from lora_diag.models.losses import Losses
from lora_diag.models.methods import add_lora
from lora_diag.models.opening import Model
from lora_diag.models.training import RECIPE, Cell, Training, losses_after
from lora_diag.probes.intrinsic.lines import Subject
from lora_diag.probes.intrinsic.measure import SCALE_STEP, Method, Run, check_dim, rate_of, scales_of, subspace_losses
from lora_diag.probes.intrinsic.options import IntrinsicOptions
from lora_diag.probes.intrinsic.record import Intrinsic
from lora_diag.records import LeftOut, Results
from lora_diag.rendering.text import duration
from lora_diag.running.measuring import check_ranks
from lora_diag.running.options import show_options
from lora_diag.running.probing import check_files, pluralize
from lora_diag.running.progress import RunRecords
from lora_diag.running.training_runs import Arm, RunPlan, TrainRun, Trial


@show_options
def probe_intrinsic(
    base: Path | str,
    **options: Unpack[IntrinsicOptions],
) -> Results[Any]:
    r"""Train BASE in random subspaces of d dimensions, in full, and by LoRA, and compare the losses.

    θ = θ_0 + P·z with z ∈ R^d trained and P a fixed random D × d projection (Fastfood, never materialized); ``said``
    adds one trained scale per layer. All runs have the same batches in the same order and the same number of steps.
    Each size tries all its learning rates with the first seed; the best on the first evaluation set is run with the
    other seeds.

    Args:
        base: Base model: a folder that transformers can open, or a Hub id.
        data: Training text or JSONL.
        evaluate: Held-out files of the same distribution; the first decides on learning rates.
        shifted: Files of another distribution.
        dims: Dimensions d.
        projection: ``did`` (Li et al. 2018) or ``said`` (Aghajanyan et al. 2020).
        share: Fraction of full fine-tuning's gain over BASE to reach.
        ranks: Ranks of LoRAs for comparison; may be empty.
        paces: Learning rates of the subspaces as equivalent rates of full fine-tuning: z has the rate pace·√(D/d), at
            which a step of Adam moves the weights as far.
        full_rates: Learning rates of full fine-tuning.
        lora_rates: Learning rates of LoRA.
        steps: Number of updates of a run.
        repeats: Number of runs of each size at its best rate; they differ in P or in the initial factors.
        **options: ``IntrinsicOptions``.

    Returns:
        The records are in ``whole``: BASE's losses, and those of every run, set by set.

    Raises:
        UsageError: An option is invalid, ``dtype`` is not ``float32`` (others lose the steps of full fine-tuning to
            rounding), the training text is also an evaluation set, or the extra ``train`` is missing.
        InputError: An input cannot be read, or the model cannot be opened or adapted.

    Reference:
        Li, Farkhoor, Liu and Yosinski 2018, arXiv:1804.08838; Aghajanyan, Zettlemoyer and Gupta 2020, arXiv:2012.13255.

    Example:
        >>> found = probe_intrinsic("sample_checkpoints/base",  # doctest: +SKIP
        ...     data="train.txt", evaluate=["held_out.txt"], dims=[10, 100], steps=50)
        >>> [(record.subject, record.loss) for record in found.whole]  # doctest: +SKIP
    """
    grids = ("paces", "full_rates", "lora_rates")
    run = TrainRun("probe intrinsic", options, IntrinsicOptions, grids, ("steps", "repeats"))
    data, evaluate, shifted = (run.options[name] for name in ("data", "evaluate", "shifted"))
    dims, share, ranks, steps, seeds = (run.options[n] for n in ("dims", "share", "ranks", "steps", "repeats"))
    paces, full_rates, lora_rates = (run.options[name] for name in grids)
    method: Method = "said" if run.options["projection"] == "said" else "plain"
    requested = list(check_ranks(ranks)) if ranks else []
    if not dims or min(dims) < 1:
        raise UsageError(f"--dims {','.join(map(str, dims))}: dimensions must be positive integers")
    if not 0 < share < 1:
        raise UsageError(f"--share {share}: must lie between 0 and 1")
    if (dtype := run.options["dtype"]) != "float32":
        raise UsageError(
            f"--dtype {dtype}: rounds away most steps of full fine-tuning, the reference of the measurement; use "
            "float32"
        )
    check_files([base], evaluate, *shifted, data)
    model = run.open(base)
    total = sum(parameter.numel() for parameter in model.module.parameters())
    for dim in dims:
        check_dim(dim, total, scales_of(model.module) if method == "said" else 0)
    run.read_all(data, evaluate, shifted, steps)
    settings = {
        "dims": sorted(set(dims)),
        "method": method,
        "share": share,
        "ranks": requested,
        "paces": sorted(set(paces)),
        "full_rates": sorted(set(full_rates)),
        "lora_rates": sorted(set(lora_rates)),
        **run.trained(seeds),
        "params": total,
        "scale_step": SCALE_STEP if method == "said" else None,
        "optimizer": RECIPE,
    }

    def measure_missing(kept: RunRecords[Any]) -> list[LeftOut]:
        probe = _Probe(model, method, total, run.walk(kept, seeds))
        arms = {
            "of full fine-tuning": probe.arm("full", [None], full_rates),
            "in subspaces": probe.arm("subspace", sorted(set(dims)), paces),
            **({"of LoRA": probe.arm("lora", requested, lora_rates)} if ranks else {}),
        }
        probe.report_cost(arms)
        probe.plan.measure_base(model, partial(_record, cell=None, params=0, last=None))
        for arm in arms.values():
            probe.plan.run(arm)
        return []

    return run.over(run.inputs(open_checkpoint(base)), settings, measure_missing)


@dataclass(frozen=True, slots=True)
class _Cell:
    """One run.

    Args:
        subject: The trained parameters: all weights (``full``), z in a ``subspace``, or ``lora``'s factors.
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
        """The learning rate of Adam."""
        return self.rate if self.dim is None else rate_of(self.rate, self.dim, self.total)

    @property
    def fields(self) -> dict[str, Any]:
        """Fields that identify its records."""
        return {"subject": self.subject, "dim": self.dim, "rank": self.rank, "lr": self.lr, "seed": self.seed}

    @property
    def label(self) -> str:
        """Label of the run."""
        size = {"full": "full", "subspace": f"d={self.size}", "lora": f"r={self.size}"}[self.subject]
        return f"{size} lr={self.lr:.3g} seed {self.seed}"


@dataclass(frozen=True, slots=True)
class _Probe:
    """State of a run."""

    model: Model
    method: Method
    total: int
    plan: RunPlan

    def arm(self, subject: Subject, sizes: Sequence[int | None], rates: Sequence[float]) -> Arm:
        """Return a trained method with its grid of sizes and rates."""
        return Arm(tuple(sizes), tuple(sorted(set(rates))), partial(self._make_trial, subject))

    def _make_trial(self, subject: Subject, size: int | None, rate: float, seed: int) -> Trial:
        cell = _Cell(subject, size, rate, seed, self.method, self.total)
        return Trial(cell.fields, cell.label, partial(self._train_cell, cell))

    def _train_cell(
        self, cell: _Cell, training: Training, sets: Sequence[Texts], after: Callable[[], None]
    ) -> list[Intrinsic]:
        if cell.dim is not None:
            run = Run(cell.dim, cell.rate, cell.seed, cell.method)
            by_set, last = subspace_losses(self.model, run, training, sets, after)
        else:
            training_cell = Cell(cell.rank, cell.lr, cell.seed, "full" if cell.rank is None else "lora")
            by_set, last = losses_after(self.model, training_cell, training, sets, after)
        params = self._count_params(cell)
        return [_record(texts, losses, cell, params, last) for texts, losses in zip(sets, by_set, strict=True)]

    def _count_params(self, cell: _Cell) -> int:
        """Count the trained parameters of a run."""
        if cell.rank is not None:
            with add_lora(self.model, cell.rank, self.plan.training.kind) as tuned:
                return sum(parameter.numel() for parameter in tuned.module.parameters() if parameter.requires_grad)
        return cell.dim or self.total

    def report_cost(self, arms: Mapping[str, Arm]) -> None:
        """Time one step of each kind and one evaluation batch, and report the estimated cost."""
        plan = self.plan
        seconds, costs = plan.cost(list(arms.values()), bases=not plan.has(subject="base"))
        lines = [
            f"{pluralize(runs, 'run', 'runs')} {description} of {plan.training.steps} steps of {step:.2g} s"
            for description, (runs, step) in zip(arms, costs, strict=True)
        ]
        # copy, gradients and Adam's two moments of all weights; a subspace holds P, the weights in use, their gradients
        gib = 16 * self.total / 2**30
        memory = f"; takes {gib:.1f} GiB in addition to BASE" if gib >= 0.1 else ""
        plan.watch.note(
            f"about {duration(seconds)}: {', '.join(lines)}, plus evaluation{plan.more(list(arms.values()))}{memory}"
        )


def _record(texts: Texts, losses: Losses, cell: _Cell | None, params: int, last: float | None) -> Intrinsic:
    finite = last is not None and abs(last) < float("inf")  # NaN compares false
    return Intrinsic(
        **losses.on(texts),
        **(cell.fields if cell else {"subject": "base"}),
        params=params,
        pace=cell.rate if cell and cell.rank is None else None,
        loss=losses.mean if losses.is_finite else None,
        train_loss=last if finite else None,
    )
