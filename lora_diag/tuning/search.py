"""Run the search stage by stage, and record each decision as it is made.

Decisions of an interrupted run are read from its records; its training runs are not repeated.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from statistics import fmean, stdev
from typing import Any, TypeVar

from lora_diag.catalog import read_results
from lora_diag.decisions.allocate.record import Allocation
from lora_diag.decisions.allocate.run import allocate
from lora_diag.diagnostics.spectrum.run import spectrum
from lora_diag.errors import InconclusiveError, LoradiagError
from lora_diag.models.training import TrainingSettings, layers_without_head
from lora_diag.probes.sweep.measure import probe_sweep
from lora_diag.probes.sweep.verdict import Swept, swept_of
from lora_diag.records import Probe, Results
from lora_diag.running.progress import Progress, RunRecords
from lora_diag.running.training_runs import ProbeWorkers, TrainRun
from lora_diag.tuning import TuneOptions, planning, trials
from lora_diag.tuning.planning import COMPARED, Omission, SearchDeadline, TuneTarget
from lora_diag.tuning.record import Tune, TuneDecision, TunePlan, TuneTrial
from lora_diag.tuning.trials import ADAPTER, Contest, Gap, RankChoice, TrialRun, Trials, Variant

# LoRA's best learning rate is about ten times that of full fine-tuning (Schulman et al. 2025); 2 to
# 63 in evidence.md.
FULL_OVER_LORA = 0.1
# "Higher ranks" are trained at this multiple of the budget.
RAISED_FACTOR = 1.5
# All layers of a pilot's spectrum: a pooler that has an adapter gets a rank, and is no head that is
# trained in full.
ALL_LAYERS = "."
# The reason of what a plan omits, or what a search omits of its plan.
OMITTED = "omitted to keep --time"
# Stages whose runs count against the plan's number of trials.
TRIAL_STAGES = {"stability", "escalation"}
# Most layers that a decision lists.
MAX_NAMED = 4

# Options that every sweep of a search has in common.
SWEEP_OPTIONS = (
    "data",
    "eval",
    "shifted",
    "batch",
    "max_sequences",
    "length",
    "tokenizer",
    "dtype",
    "device",
    "concurrent",
    "seed",
    "gain_tolerance",
    "target_modules",
    "dora",
    "rslora",
    "quantized",
    "gradient_checkpointing",
)

# The reason of a decision after a contest with the incumbent, by its outcome.
VERDICTS = {
    "better": "better than {} significantly, by paired differences",
    "tie": "not significantly different from {}",
    "worse": "worse than {} significantly, by paired differences",
    "not known": "too few runs with a loss",
}


T = TypeVar("T")


class TimeIsUpError(Exception):
    """The time limit was reached during a run."""


@dataclass
class Tuner:
    """One search.

    Args:
        base: The model.
        folder: Folder of the run.
        run_: Options, model and texts.
        target: The layers that get an adapter.
        plan: The plan.
        kept: The records.
        deadline: The time limit.
        workers: The workers of a cluster; None to train here.

    Attributes:
        swept: The sweep over shared ranks, with its verdict.
        choice: The shared rank.
    """

    base: Path | str
    folder: Path
    run_: TrainRun[TuneOptions]
    target: TuneTarget
    plan: TunePlan
    kept: RunRecords[Any]
    deadline: SearchDeadline
    workers: ProbeWorkers | None = None
    swept: Swept = field(init=False)
    choice: RankChoice = field(init=False)
    _seen: int = 0
    _trained: int = 0
    _is_limited: bool = False
    _has_adapter: bool = False
    _label: str = ""
    _events: int = 0
    _steps: int = 0

    def __post_init__(self) -> None:
        self.first_seed: int = self.run_.options["seed"]
        self.training: TrainingSettings = replace(self.run_.training, steps=self.plan.steps)
        sets = self.run_.sets
        self.own = next((texts.name for texts in sets if not texts.shifted), sets[0].name)
        self.shifted = [texts.name for texts in sets if texts.shifted and texts.name != self.own]
        grid = self.run_.options["quantized"]
        self.trials = Trials(
            self.run_.model,
            self.training,
            sets,
            self.kept,
            grid,
            self._report_batches,
            self.workers,
        )
        self._steps = self.plan.steps
        self._batches = self.run_.batches(sets)
        self.slots = 1 if self.workers is None else self.workers.slots
        self.kept.watch.total = sum(stage.runs for stage in self.plan.stages) * self.plan.steps

    # -- time
    # ------------------------------------------------------------

    @property
    def planned_run(self) -> float:
        """Seconds of a run, by the plan."""
        return self.plan.steps * self.plan.step_seconds + self.plan.evaluation_seconds

    @property
    def one_run(self) -> float:
        """Seconds of a run, at the pace of the last one."""
        return self.deadline.pace * self.planned_run

    @property
    def left(self) -> float:
        """Seconds left for the search, without those to train the choice and compare it; infinite
        without a limit.
        """
        left = self.deadline.left - COMPARED * self.deadline.pace * self.plan.evaluation_seconds
        if not self._has_adapter:
            left -= self.one_run
        return left

    def allows(self, runs: float) -> bool:
        """Return whether there is time for this number of runs."""
        return math.ceil(runs / self.slots) * self.one_run <= self.left

    @contextmanager
    def _limit_time(self) -> Iterator[None]:
        """Stop training in the block at the time limit."""
        self._is_limited = True
        try:
            with suppress(TimeIsUpError):
                yield
        finally:
            self._is_limited = False

    def _attempt(
        self,
        decision: tuple[str, str],
        runs: int,
        train: Callable[[], T],
        outcome: str,
        reason: str,
        **fields: Any,
    ) -> T | None:
        """Train within the plan and the time limit, and return the result; None without one.

        Args:
            decision: Stage and name.
            runs: Training runs, at most.
            train: Trains, and records the decision.
            outcome: Outcome of the decision if the runs are not allowed, or are stopped by the
                limit.
            reason: Its reason.
            **fields: Further fields of that decision.
        """
        earlier = self.find_decision(*decision)
        is_trial = decision[0] in TRIAL_STAGES
        if earlier is None:
            is_allowed = self.allows(runs) and not (is_trial and self._trained >= self.plan.trials)
        else:
            is_allowed = earlier.outcome not in {"not tried", "proposed"}
        if is_allowed:
            self._trained += is_trial
            with self._limit_time():
                return train()
        self.decide(*decision, outcome, reason, **fields)
        return None

    def _adapt_plan(self, possible: Collection[Omission], is_grid_done: bool = False) -> None:
        """Omit some of these if the search, at the pace of its runs, no longer fits into the time
        left.
        """
        pace = self.deadline.pace
        self.plan, saved = planning.omit(self.plan, self.left / pace, possible, is_grid_done)
        for omission, seconds in saved.items():
            why = f"{OMITTED}, as a run takes {pace:.2g} times the planned time"
            self.decide("budget", omission, "not tried", why, seconds=pace * seconds)

    def _report_batches(self, label: str, count: int = 1) -> None:
        """Report steps or batches as progress, and measure the pace.

        Raises:
            TimeIsUpError: The time limit is over, in a block that it applies to.
        """
        self.kept.watch.batch(label, count)
        if label != self._label:
            self._label = label
            self._events = 0
        before = self._events
        self._events += count
        # A run has its steps first, then its evaluation.
        steps = max(0, min(self._events, self._steps) - before)
        plan = self.plan
        step_seconds = plan.full_step_seconds if label.startswith("full ") else plan.step_seconds
        planned = steps * step_seconds + (count - steps) * plan.evaluation_seconds / self._batches
        self.deadline.count(planned / self.slots, self.planned_run)
        if self._is_limited and self.left < 0:
            raise TimeIsUpError

    def _report_progress(self, event: Progress) -> None:
        """Pass on the progress of a sweep, whose events may be of several steps or of none."""
        count = event.done - self._seen
        self._seen = event.done
        self._report_batches(event.label, count)

    # -- records
    # ------------------------------------------------------------

    def find_decision(self, stage: str, name: str) -> TuneDecision | None:
        """Return a recorded decision, also of an interrupted run; None if it was not made."""
        return next(self.kept.find(record="tune_decision", stage=stage, name=name), None)

    def decide(self, stage: str, name: str, outcome: Any, reason: str, **fields: Any) -> None:
        """Record a decision and report it as a note, unless it is recorded already."""
        if self.find_decision(stage, name) is None:
            self.kept.put(
                TuneDecision(stage=stage, name=name, outcome=outcome, why=reason, **fields)
            )
            self.kept.watch.note(f"{stage}: {name} {outcome}: {reason}")

    def _decide_on(
        self,
        stage: str,
        variant: Variant,
        outcome: str,
        reason: str,
        own: Gap | None,
        shifted: Gap | None = None,
        name: str = "",
        **fields: Any,
    ) -> None:
        """Record a decision on a trained configuration, with its gaps to the incumbent."""
        fields |= {"lr": variant.lr, "params": self._count_params(variant)}
        if own is not None:
            value = own.value if math.isfinite(own.value) else None
            fields |= {"gap": value, "error": own.error, "seeds": own.seeds}
        if shifted is not None:
            fields |= {"gap_shifted": shifted.value, "error_shifted": shifted.error}
        self.decide(stage, name or variant.name, outcome, reason, **fields)

    def _count_params(self, variant: Variant) -> int:
        """Return the trainable parameters of a configuration by its records; 0 if it has none."""
        return next(
            (trial.params for trial in self.kept.find(record="tune_trial", variant=variant.name)), 0
        )

    def _get_base(self, name: str) -> TuneTrial:
        """Return the record of BASE on a set."""
        base: TuneTrial = next(self.kept.find(record="tune_trial", variant="base", set=name))
        return base

    def _get_losses(self, variant: Variant, name: str) -> dict[int, float]:
        """Return the losses of a configuration on a set by seed, without runs that diverged."""
        return {seed: run.loss for seed, run in self.trials.runs(variant).get(name, {}).items()}

    def _get_gains(self, variant: Variant, name: str) -> list[float]:
        """Return how far a configuration is below BASE's loss on a set, for each seed; empty if
        BASE has no loss.
        """
        base = self._get_base(name).loss
        if base is None:
            return []
        return [base - loss for loss in self._get_losses(variant, name).values()]

    def _get_shifted_gains(self, variant: Variant) -> list[float]:
        """Return the gains of a configuration on the first shifted set; empty without one."""
        return self._get_gains(variant, self.shifted[0]) if self.shifted else []

    def _get_full_gain(self) -> float | None:
        """Return the mean gain of full fine-tuning on the deciding set; None if it was not trained
        or has none.
        """
        base = self._get_base(self.own).loss
        row = self.swept.lines.get("full")
        if base is None or row is None or row.mean >= base:
            return None
        return base - row.mean

    # -- stages
    # ------------------------------------------------------------

    def run(self) -> tuple[Variant, Tune]:
        """Run all stages, and return the chosen configuration, with its adapter trained, and its
        record.
        """
        plan = self.plan
        rules = "; ".join(
            f"{name}: {'more than full rank' if r is None else f'r ≥ {r}'}"
            for name, r in plan.rules.items()
        )
        self.decide(
            "budget",
            "largest shared rank",
            "chosen",
            f"{plan.budget:,} parameters allow r ≤ {plan.largest}; {plan.tokens:,} predicted "
            f"tokens; {rules}",
            rank=plan.largest,
            params=plan.params(plan.largest),
        )
        for omission in plan.left_out:  # without a note: the plan was printed
            why = OMITTED
            if omission == Omission.FULL_NEEDS_FLOAT32:
                why = "--dtype or --quantized is given"
            seconds = plan.saved.get(omission)
            self.kept.put(
                TuneDecision(
                    stage="budget", name=omission, outcome="not tried", why=why, seconds=seconds
                )
            )
        omitted = self.kept.find(record="tune_decision", stage="budget", outcome="not tried")
        self.plan = planning.repeat_omissions(plan, [decision.name for decision in omitted])
        self.trials.measure_base()
        self._choose_rank(self._choose_rates())
        incumbent = self._make_uniform(self.choice.rank)
        self._train_with_adapters(incumbent)
        self._has_adapter = True
        incumbent = self._redistribute(incumbent)
        incumbent = self._stabilize(incumbent)
        self._escalate(incumbent)
        record = self._make_record(incumbent)
        self.kept.put(record)
        adapter = self.adapter_folder(incumbent)
        if not (adapter / ADAPTER).is_file():
            self.trials.train(TrialRun(incumbent, self.first_seed, adapter))
        self.trials.compare_with_base(incumbent, adapter)
        return incumbent, record

    def _make_uniform(self, rank: int, name: str = "") -> Variant:
        """Return the configuration of one rank everywhere, at the learning rate of the
        shared rank.
        """
        return Variant(
            name or trials.uniform_name(rank),
            self.target.config(rank),
            self.choice.lr,
            self.plan.steps,
        )

    def _train_with_adapters(self, *variants: Variant) -> None:
        """Train configurations with the first seed, unless that is done, and keep their
        adapters.
        """
        self.trials.train(
            *(TrialRun(one, self.first_seed, self.adapter_folder(one)) for one in variants)
        )

    def adapter_folder(self, variant: Variant) -> Path:
        """Return the folder for the adapter of a configuration."""
        return self.folder / "trials" / variant.name

    # -- shared ranks
    # ------------------------------------------------------------

    def _run_sweep(
        self, file: str, ranks: Sequence[int], rates: Sequence[float], seeds: int, **options: Any
    ) -> Results[Any]:
        """Run ``probe sweep``, or resume or extend that in the file; return its results up to the
        time limit.
        """
        path = self.folder / file
        self._seen = 0
        shared = self.run_.settings(*SWEEP_OPTIONS)
        shared |= {"engine": self.run_.on, "on_progress": self._report_progress}
        options = {"steps": self.plan.steps, "widen": self.plan.widen, **options}
        self.deadline.stop_timing()
        self._steps = options["steps"]
        if path.is_file() and self.left < 0:
            return read_results(path)
        with self._limit_time():
            given = {"ranks": ranks, "lr": rates, "repeats": seeds, **shared, **options}
            probe_sweep(self.base, output=path, resume=path.is_file(), **given)
        return read_results(path)

    def _choose_rates(self) -> tuple[float, ...]:
        """Return the learning rates to try with all steps, after a short round if the
        plan has one.
        """
        plan = self.plan
        if not plan.halving:
            return plan.rates
        steps = planning.short_steps(plan.steps)
        ends = sorted({plan.ranks[0], plan.ranks[-1]})
        results = self._run_sweep("rates.jsonl", ends, plan.rates, 1, steps=steps, widen=0)
        losses = {}
        for record in results.whole_of(Probe):
            is_lora = (record.set, record.subject) == (self.own, "lora")
            if is_lora and record.rank is not None and record.lr is not None:
                losses[record.rank, record.lr] = record.loss
        rates = planning.halve_rates(losses) or plan.rates
        self.decide(
            "rates",
            "learning rates",
            "chosen",
            f"{', '.join(f'{rate:g}' for rate in rates)} of {len(plan.rates)}: lowest losses after "
            f"{steps} steps",
            files=("rates.jsonl",),
        )
        self._adapt_plan(planning.AFTER_RATES)
        return rates

    def _train_first_seed(self, rates: Sequence[float]) -> None:
        """Train all ranks and rates with one seed, and adapt the plan to their pace, unless the
        sweep has more seeds.

        Without a time limit nothing is done: the sweep has the same runs.
        """
        path = self.folder / "sweep.jsonl"
        if self.plan.limit is None or (path.is_file() and self._read_swept_setting("repeats") > 1):
            return
        self._run_sweep(path.name, self.plan.ranks, rates, 1)
        self._adapt_plan(planning.AFTER_GRID, is_grid_done=True)

    def _sweep_ranks(
        self, rates: Sequence[float], ranks: Sequence[int], repeats: int
    ) -> tuple[Swept, RankChoice]:
        """Run the sweep over shared ranks or resume it, record its losses, and return its verdict
        and the choice.

        Raises:
            InconclusiveError: No run is finished with a finite loss, or BASE has none.
        """
        plan = self.plan
        full: dict[str, Any] = {}
        if plan.full:
            full = {"full": True, "full_lr": [rate * FULL_OVER_LORA for rate in rates]}
        results = self._run_sweep("sweep.jsonl", ranks, rates, repeats, **full)
        if results.end is None:
            self.decide("ranks", "the rest of the sweep", "not tried", "--time was reached")
        # A resumed sweep may have more ranks and seeds.
        allowed_ranks = {None, *ranks}
        seeds = range(self.first_seed, self.first_seed + repeats)
        whole = tuple(
            record
            for record in results.whole_of(Probe)
            if record.rank in allowed_ranks and (record.lr is None or record.seed in seeds)
        )
        results = replace(results, whole=whole)
        swept = swept_of(results)
        if swept is None or swept.verdict.best is None:
            raise InconclusiveError(
                self.folder,
                "no rank is trained with a finite loss",
                "lower $lr, or give more $time",
            )
        self.trials.copy(results.whole_of(Probe), plan, self.target.total)
        return swept, trials.choose_rank(swept)

    def _choose_rank(self, rates: Sequence[float]) -> None:
        """Choose the shared rank, with more seeds and an intermediate rank where these may decide
        more.
        """
        self._train_first_seed(rates)
        plan = self.plan
        repeats = plan.repeats
        self._record_rank("coarse", *self._sweep_ranks(rates, plan.ranks, repeats))
        rates = self._read_swept_setting("lr")
        needed = self.swept.verdict.needed_seeds
        if not self.choice.significant and plan.more_seeds and needed is not None:
            if why := self._explain_no_more_seeds(needed):
                self.decide("ranks", "more seeds", "not tried", why, seeds=needed)
            else:
                repeats = needed
                self._record_rank(f"{needed} seeds", *self._sweep_ranks(rates, plan.ranks, repeats))
        middle = trials.between(self.choice.rank, self.swept.ranks) if plan.finer else None
        if middle is None:
            return
        runs = len(rates) + plan.widen + repeats - 1
        if middle not in self._read_swept_setting("ranks") and not self.allows(runs):
            self.decide("ranks", f"r={middle}", "not tried", "no time was left", rank=middle)
            return
        finer, suggested = self._sweep_ranks(rates, [*plan.ranks, middle], repeats)
        if self.choice.significant and not suggested.significant:
            why = f"r={middle} is not shown to be enough, r={self.choice.rank} was without it"
            suggested = replace(self.choice, why=why)
        self._record_rank("fine", finer, suggested)

    def _explain_no_more_seeds(self, needed: int) -> str:
        """Return why this number of seeds is not trained; empty if it is."""
        repeats = self.plan.repeats
        if needed > 2 * repeats:
            return f"about {needed} would decide, more than twice those of the plan"
        runs = len(self.swept.ranks) * (needed - repeats)
        if self._read_swept_setting("repeats") < needed and not self.allows(runs):
            return f"no time was left; about {needed} would decide"
        return ""

    def _read_swept_setting(self, setting: str) -> Any:
        """Return a setting of the sweep on disk, so that a resumed search decides as the
        interrupted one.
        """
        return read_results(self.folder / "sweep.jsonl").run.settings[setting]

    def _record_rank(self, name: str, swept: Swept, choice: RankChoice) -> None:
        """Keep the sweep and the choice of a shared rank, and record this with the gap
        to the best.
        """
        self.swept = swept
        self.choice = choice
        behind = (
            standing.behind for standing in swept.verdict.standings if standing.rank == choice.rank
        )
        self.decide(
            "ranks",
            f"shared rank, {name}",
            "chosen",
            f"r={choice.rank} of {', '.join(map(str, swept.ranks))}: {choice.why}",
            rank=choice.rank,
            lr=choice.lr,
            params=self.plan.params(choice.rank),
            gap=next(behind, None),
            seeds=swept.verdict.seeds,
            files=("sweep.jsonl",),
        )

    # -- non-uniform ranks
    # ------------------------------------------------------------

    def _redistribute(self, incumbent: Variant) -> Variant:
        """Return the better of uniform and non-uniform ranks; uniform wins ties, and where nothing
        is compared.
        """
        decision = "redistribution", "non-uniform ranks"
        if not self.plan.redistribute:
            return incumbent
        if len(self.target.shapes) < 2:
            self.decide(*decision, "not needed", "one matrix gets an adapter")
            return incumbent
        if self.swept.verdict.outcome == "no gain":
            why = f"no rank lowers the loss of BASE, {incumbent.name} neither"
            self.decide(*decision, "not needed", why)
            return incumbent
        choose = partial(self._choose_best, incumbent)
        runs = 2 + self.plan.repeats
        best = self._attempt(decision, runs, choose, "not tried", "no time was left")
        return best or incumbent

    def _make_candidate(self) -> Variant | None:
        """Train a pilot, and return non-uniform ranks of the same budget by its spectrum.

        Ranks that cannot be allocated or expressed by PEFT, or that equal the shared rank, are
        recorded, and None is returned.
        """
        name = "marginal"
        shared = self.choice.rank
        rank = min(2 * shared, max(map(min, self.target.shapes.values())))
        pilot = self._make_uniform(rank, f"pilot-r{rank}")
        self._train_with_adapters(pilot)
        path = self.folder / "pilot.jsonl"
        device = self.run_.options["device"]
        spectrum(self.base, self.adapter_folder(pilot), output=path, overwrite=True, device=device)
        try:  # every layer is trained, unless ranks are 1 on average
            allocated = self._allocate_from_pilot(shared * self.plan.per_rank, min(1, shared - 1))
            config = self.target.config_of(allocated)
        except LoradiagError as error:
            self.decide("redistribution", name, "not tried", str(error))
            return None
        if {record.rank for record in allocated} == {shared}:
            self.decide("redistribution", name, "not needed", "gives every layer the shared rank")
            return None
        return Variant(name, config, self.choice.lr, self.plan.steps)

    def _allocate_from_pilot(self, params: int, min_rank: int) -> Results[Allocation]:
        """Return ranks from the pilot's spectrum."""
        return allocate(
            self.folder / "pilot.jsonl", params=params, min_rank=min_rank, layers=ALL_LAYERS
        )

    # -- contests
    # ------------------------------------------------------------

    def _choose_best(self, incumbent: Variant) -> Variant:
        """Return the incumbent, or the candidate of non-uniform ranks that beats it."""
        decision = "redistribution", "non-uniform ranks"
        candidate = self._make_candidate()
        if candidate is None:
            self.decide(*decision, "not tried", "no other ranks to try")
            return incumbent
        if not self._contest("redistribution", incumbent, candidate):
            self.decide(*decision, "rejected", f"{incumbent.name} is as good at the same budget")
            return incumbent
        self.decide(*decision, "kept", f"{candidate.name} is better at the same budget")
        return candidate

    def _gap_at_first_seed(self, incumbent: Variant, challenger: Variant) -> Gap:
        """Return the gap of the first seed on the deciding set; ∞ if the challenger diverged, −∞ if
        only the other.
        """
        before = self._get_losses(incumbent, self.own).get(self.first_seed, math.inf)
        after = self._get_losses(challenger, self.own).get(self.first_seed, math.inf)
        return Gap(math.inf if after == math.inf else after - before, None, 1)

    def _contest(
        self, stage: str, incumbent: Variant, challenger: Variant, reason: str = ""
    ) -> bool:
        """Compare a challenger with the incumbent, record the outcome, and return whether the
        challenger is kept.

        Only a challenger that is ahead by the tolerance at the first seed is trained with further
        seeds, as is the incumbent.

        Args:
            stage: The stage.
            incumbent: The configuration to beat.
            challenger: The other.
            reason: Why it is tried, with a semicolon.
        """
        self._train_with_adapters(challenger)
        gap = self._gap_at_first_seed(incumbent, challenger)
        tolerance = self.swept.verdict.tolerance
        if not gap.value < -tolerance:
            why = (
                f"{reason}not ahead by the tolerance of {tolerance:.4f} nats of {incumbent.name} "
                "at the first seed"
            )
            self._decide_on(stage, challenger, "rejected", why, gap)
            return False
        seeds = list(range(self.first_seed, self.first_seed + max(self.plan.repeats, 2)))
        self.trials.train(
            *(TrialRun(variant, seed) for seed in seeds for variant in (challenger, incumbent))
        )
        result = self._compare(incumbent, challenger, seeds)
        why = VERDICTS[result.outcome].format(incumbent.name)
        if result.outcome == "better" and not result.kept:
            why += ", but worse on a shifted set"
        outcome = "kept" if result.kept else "rejected"
        self._decide_on(stage, challenger, outcome, why, result.own, result.shifted)
        return result.kept

    def _compare(
        self, incumbent: Variant, challenger: Variant, seeds: Sequence[int] | None = None
    ) -> Contest:
        """Compare a challenger with the incumbent on all sets, with these seeds or all."""
        return trials.contest(
            self.trials.runs(incumbent, seeds),
            self.trials.runs(challenger, seeds),
            self.own,
            self.shifted,
            self.trials.predictions,
        )

    # -- stability
    # ------------------------------------------------------------

    def _stabilize(self, incumbent: Variant) -> Variant:
        """Return the configuration after the trials that the curves justify."""
        reasons = trials.stability_trials(self._collect_curves(incumbent))
        if not reasons:
            self.decide(
                "stability",
                "curves",
                "not needed",
                "training and held-out loss fall together, seeds agree",
            )
        for name, reason in reasons.items():
            trial = trials.change_variant(incumbent, name)
            compare = partial(self._contest, "stability", incumbent, trial, f"{reason}; ")
            decision = "stability", trial.name
            runs = 1 + self.plan.repeats
            seconds = self.plan.repeats * self.one_run
            if self._attempt(decision, runs, compare, "proposed", reason, seconds=seconds):
                incumbent = trial
        return incumbent

    def _collect_curves(self, incumbent: Variant) -> trials.Curves:
        """Return the gains of the incumbent from which stability is judged."""
        gains = self._get_gains(incumbent, self.own)
        runs = self.trials.runs(incumbent)[self.own].values()
        train_losses = [run.train_loss for run in runs if run.train_loss is not None]
        base_train = self._get_base(self.own).train_loss
        train_gain = 0.0
        if base_train is not None and train_losses:
            train_gain = base_train - fmean(train_losses)
        return trials.Curves(
            gain=fmean(gains),
            train_gain=train_gain,
            spread=stdev(gains) if len(gains) > 1 else None,
            tolerance=self.swept.verdict.tolerance,
            diverged=trials.count_diverged(self.swept.records, self.choice.rank, incumbent.lr),
            gain_shifted=_average(self._get_shifted_gains(incumbent)),
        )

    # -- escalation
    # ------------------------------------------------------------

    def _escalate(self, incumbent: Variant) -> None:
        """Estimate the gain of more parameters than the budget, by training where there is time."""
        of_full = self._get_full_gain()
        share = fmean(self._get_gains(incumbent, self.own)) / of_full if of_full else None
        why = trials.escalation_reason(self.choice.rank, self.swept.ranks, share)
        if not why:
            why = "a rank below the largest is enough"
            if self.swept.verdict.outcome == "no gain":
                why = "no rank lowers the loss of BASE"
            self.decide("escalation", "more than LoRA within the budget", "not needed", why)
            return
        further = replace(incumbent, name=f"{incumbent.name}+biases-norms", vectors=True)
        escalations: dict[str, tuple[Variant | None, tuple[str, ...]]] = {
            "higher ranks in named layers": self._raise_rank(incumbent),
            "more placements": self._extend_placement(incumbent),
            "biases and norms": (further, ()),
        }
        for name, (variant, layers) in escalations.items():
            if variant is None:
                why_not = "no configuration of this kind could be made for this model"
                self.decide("escalation", name, "not needed", why_not, layers=layers)
                continue
            test = partial(self._test_escalation, name, variant, incumbent, layers)
            fields = {"seconds": self.one_run, "layers": layers}
            self._attempt(("escalation", name), 1, test, "proposed", why, **fields)
        self._record_full(incumbent, why)

    def _test_escalation(
        self, name: str, variant: Variant, incumbent: Variant, layers: tuple[str, ...]
    ) -> None:
        """Train a configuration beyond the budget with one seed; record it as proposed, rejected or
        not tried.
        """
        try:
            self.trials.train(TrialRun(variant, self.first_seed))
        except LoradiagError as error:
            self.decide("escalation", name, "not tried", str(error), layers=layers)
            return
        gap = self._compare_first_seed(incumbent, variant, self.own)
        shifted_gap = None
        if self.shifted:
            shifted_gap = self._compare_first_seed(incumbent, variant, self.shifted[0])
        outcome, verdict = "rejected", "does not lower the loss significantly"
        if gap is not None and gap.half is not None and gap.value < -gap.half:
            outcome, verdict = "proposed", "lowers the loss"
        reason = f"trained with one seed: {verdict}; outside the budget"
        self._decide_on(
            "escalation", variant, outcome, reason, gap, shifted_gap, name=name, layers=layers
        )

    def _compare_first_seed(self, incumbent: Variant, challenger: Variant, name: str) -> Gap | None:
        """Return the gap of the first seed, with its error over paired sequences; None without both
        runs.
        """
        runs = (
            self.trials.runs(variant).get(name, {}).get(self.first_seed)
            for variant in (incumbent, challenger)
        )
        # As two seeds of the same runs: their spread over seeds is 0, so the error is that over
        # sequences.
        before, after = ({} if run is None else {0: run, 1: run} for run in runs)
        gap = trials.gap_of(before, after, self.trials.predictions.get(name, ()))
        return None if gap is None else Gap(gap.value, gap.error or None, 1, gap.half or None)

    def _raise_rank(self, incumbent: Variant) -> tuple[Variant | None, tuple[str, ...]]:
        """Return the incumbent with ranks for a larger budget, and the layers with the highest
        raised ranks; or None.

        It is None without a pilot, if the ranks cannot be allocated or expressed by PEFT, or if no
        rank is raised.
        """
        shared = self.choice.rank
        if not (self.folder / "pilot.jsonl").is_file():
            return None, ()
        params = round(RAISED_FACTOR * shared * self.plan.per_rank)
        try:
            allocated = self._allocate_from_pilot(params, shared)
            config = self.target.config_of(allocated)
        except LoradiagError:
            return None, ()
        raised = [record for record in allocated if record.rank > shared]
        if not raised:
            return None, ()
        raised.sort(key=lambda record: -record.rank)
        variant = replace(incumbent, name="higher-ranks", config=config)
        return variant, tuple(record.layer for record in raised[:MAX_NAMED])

    def _extend_placement(self, incumbent: Variant) -> tuple[Variant | None, tuple[str, ...]]:
        """Return the incumbent with further linear layers, else an untied head, and the first
        names; or None.
        """
        module = self.run_.model.module
        layers = {name.removesuffix(".weight") for name in layers_without_head(module)}
        missing = sorted(layers - set(self.target.layers))
        if not missing:
            head = module.get_output_embeddings()
            tied = getattr(module.config, "tie_word_embeddings", False)
            if type(head).__name__ == "Linear" and not tied:
                missing = [path for path, submodule in module.named_modules() if submodule is head]
        if not missing:
            return None, ()
        modules = [*incumbent.config["target_modules"], *missing]
        config = {**incumbent.config, "target_modules": modules}
        variant = replace(incumbent, name=f"{incumbent.name}+placements", config=config)
        return variant, tuple(missing[:MAX_NAMED])

    def _record_full(self, incumbent: Variant, reason: str) -> None:
        """Record the further gain of full fine-tuning, or its predicted cost."""
        name = "full fine-tuning"
        row = self.swept.lines.get("full")
        if row is None:
            seconds = self.plan.steps * (self.plan.full_step_seconds or 3 * self.plan.step_seconds)
            self.decide(
                "escalation", name, "proposed", reason, params=self.target.total, seconds=seconds
            )
            return
        full = Variant("full", {}, row.lr, self.plan.steps)
        result = self._compare(incumbent, full)
        self._decide_on(
            "escalation",
            full,
            "proposed" if result.outcome == "better" else "rejected",
            VERDICTS[result.outcome].format(incumbent.name),
            result.own,
            result.shifted,
            name=name,
            files=("sweep.jsonl",),
        )

    # -- the end
    # ------------------------------------------------------------

    def _make_record(self, incumbent: Variant) -> Tune:
        """Return the record of the choice."""
        config = incumbent.config
        choice = self.choice
        losses = [*self._get_losses(incumbent, self.own).values()]
        gains = self._get_gains(incumbent, self.own)
        gain = fmean(gains)
        of_full = self._get_full_gain()
        above = next((row for row in self.swept.rows if (row.rank or 0) > choice.rank), None)
        shifted_gains = self._get_shifted_gains(incumbent)
        redistributed = self.find_decision("redistribution", "non-uniform ranks")
        non_uniform = "not tried"
        if redistributed is not None and redistributed.outcome in {"kept", "rejected"}:
            non_uniform = redistributed.outcome
        record = Tune(
            set=self.own,
            variant=incumbent.name,
            rank=choice.rank,
            ranks=trials.ranks_of(config, self.target.layers) if config["rank_pattern"] else {},
            significant=choice.significant,
            lr=incumbent.lr,
            steps=incumbent.steps,
            alpha_over_rank=float(config["lora_alpha"]) / int(config["r"]),
            alpha=float(config["lora_alpha"]) if self.target.kind.rslora else None,
            dora=self.target.kind.dora,
            dropout=float(config["lora_dropout"]),
            weight_decay=incumbent.decay,
            params=self._count_params(incumbent),
            budget=self.plan.budget,
            base_loss=self._get_base(self.own).loss,
            loss=fmean(losses),
            gain=gain,
            gain_error=_compute_error(gains),
            gain_of_full=of_full,
            share_of_full=None if of_full is None else gain / of_full,
            next_rank=None if above is None else above.rank,
            next_gain=None if above is None else fmean(losses) - above.mean,
            non_uniform=non_uniform,
            gain_shifted=_average(shifted_gains),
            gain_shifted_error=_compute_error(shifted_gains),
            set_shifted=self.shifted[0] if self.shifted else "",
            seeds=len(losses),
        )
        return record.model_copy(
            update={"significant": record.significant and record.has_significant_gain}
        )


def _average(values: Sequence[float]) -> float | None:
    """Return the mean; None without values."""
    return fmean(values) if values else None


def _compute_error(values: Sequence[float]) -> float | None:
    """Return the standard error of a mean; None for fewer than two values."""
    return stdev(values) / math.sqrt(len(values)) if len(values) > 1 else None
