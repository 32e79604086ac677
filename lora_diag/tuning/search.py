"""Run the search stage by stage, and record each decision as it is made.

Decisions of an interrupted run are read from its records; its training runs are not repeated.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

from lora_diag.catalog import read_results
from lora_diag.decisions.allocate.record import Allocation
from lora_diag.decisions.allocate.run import allocate
from lora_diag.diagnostics.spectrum.run import spectrum
from lora_diag.errors import InconclusiveError, LoradiagError
from lora_diag.metrics.statistics import errors_needed
from lora_diag.models.training import Training, layers_without_head
from lora_diag.probes.sensitivity.measure import gradients
from lora_diag.probes.sweep.measure import probe_sweep
from lora_diag.probes.sweep.verdict import Swept, best_rates, by_rank, find_diverged, swept_of
from lora_diag.records import Probe, Results
from lora_diag.running.progress import Progress, RunRecords
from lora_diag.running.training_runs import TrainRun, Workers
from lora_diag.tuning.outputs import write_outputs
from lora_diag.tuning.planning import Target, halve_rates, short_steps
from lora_diag.tuning.record import Tune, TuneDecision, TunePlan
from lora_diag.tuning.trials import (
    ADAPTER,
    Curves,
    Gap,
    Measured,
    RankChoice,
    TrialRun,
    Trials,
    Variant,
    between,
    change_variant,
    choose_rank,
    contest,
    escalation_reason,
    gap_of,
    least_rank,
    ranks_of,
    stability_trials,
    uniform_name,
)

# LoRA's best learning rate is about ten times that of full fine-tuning (Schulman et al. 2025).
FULL_OVER_LORA = 0.1
# "Higher ranks" are trained at this multiple of the budget.
RAISED_FACTOR = 1.5
# All layers of a pilot's spectrum: a pooler that has an adapter gets a rank, and is no head that is trained in full.
ALL_LAYERS = "."
# Most layers that a decision lists.
MAX_NAMED = 4

# Options of every run, in addition to options of models and texts.
RUN_OPTIONS = ("seed", "gain_tolerance", "target_modules", "dora", "rslora", "quantized", "gradient_checkpointing")

STABILITY = ("dropout", "weight-decay", "half-alpha", "fewer-steps")


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
        workers: The workers of a cluster; None to train here.
        tolerance: Nats that a smaller rank may lose, and by which a challenger must be better at the first seed to be
            trained further.
    """

    base: Path | str
    folder: Path
    run_: TrainRun
    target: Target
    plan: TunePlan
    kept: RunRecords[Any]
    workers: Workers | None = None
    tolerance: float = 0.0
    _seen: int = 0
    _trained: int = 0
    _is_limited: bool = False
    _began: float = field(default_factory=time.monotonic)

    def __post_init__(self) -> None:
        self.first_seed: int = self.run_.options["seed"]
        self.training: Training = replace(self.run_.training, steps=self.plan.steps)
        sets = self.run_.sets
        self.own = next((texts.name for texts in sets if not texts.shifted), sets[0].name)
        self.shifted = [texts.name for texts in sets if texts.shifted and texts.name != self.own]
        grid = self.run_.options["quantized"]
        self.trials = Trials(self.run_.model, self.training, sets, self.kept, grid, self._report_batches, self.workers)
        watch = self.kept.watch
        watch.total = sum(stage.runs for stage in self.plan.stages) * self.plan.steps

    # -- time --------------------------------------------------------------------------------------------------------

    @property
    def one_run(self) -> float:
        """Seconds of a run, by the plan."""
        return self.plan.steps * self.plan.step_seconds + self.plan.evaluation_seconds

    @property
    def left(self) -> float:
        """Seconds left for the search, without the time to train the chosen adapter."""
        if self.plan.limit is None:
            return math.inf
        return self.plan.limit - self.one_run - (time.monotonic() - self._began)

    @property
    def slots(self) -> int:
        """Concurrent runs."""
        return 1 if self.workers is None else self.workers.slots

    def allows(self, runs: float) -> bool:
        """Return whether there is time for this number of runs."""
        return math.ceil(runs / self.slots) * self.one_run <= self.left

    @contextmanager
    def _limit_time(self) -> Iterator[None]:
        """Stop training in the block at the time limit; the chosen adapter is trained in any case."""
        self._is_limited = True
        try:
            yield
        finally:
            self._is_limited = False

    def _report_batches(self, label: str, count: int = 1) -> None:
        """Report steps or batches as progress.

        Raises:
            TimeIsUpError: The time limit is over, in a block that it applies to.
        """
        self.kept.watch.batch(label, count)
        if self._is_limited and self.left < 0:
            raise TimeIsUpError

    def _report_progress(self, event: Progress) -> None:
        """Pass on the progress of a sweep, whose events may be of several steps or of none."""
        count, self._seen = event.done - self._seen, event.done
        self._report_batches(event.label, count)

    # -- records -----------------------------------------------------------------------------------------------------

    def find_decision(self, stage: str, name: str) -> TuneDecision | None:
        """Return a recorded decision, also of an interrupted run; None if it was not made."""
        decisions = (decision for decision in self.kept.records if isinstance(decision, TuneDecision))
        return next((decision for decision in decisions if (decision.stage, decision.name) == (stage, name)), None)

    def decide(self, stage: str, name: str, outcome: Any, reason: str, **fields: Any) -> TuneDecision:
        """Record a decision, and report it as a note."""
        decision = TuneDecision(stage=stage, name=name, outcome=outcome, why=reason, **fields)
        if self.find_decision(stage, name) is None:
            self.kept.put(decision)
            self.kept.watch.note(f"{stage}: {name} {outcome}: {reason}")
        return decision

    # -- stages ------------------------------------------------------------------------------------------------------

    def run(self) -> None:
        """Run all stages, and write the outputs."""
        plan = self.plan
        rules = "; ".join(
            f"{name}: {'more than full rank' if r is None else f'r ≥ {r}'}" for name, r in plan.rules.items()
        )
        self.decide(
            "budget",
            "largest shared rank",
            "chosen",
            f"{plan.budget:,} parameters allow r ≤ {plan.largest}; {plan.tokens:,} predicted tokens; {rules}",
            rank=plan.largest,
            params=plan.params(plan.largest),
        )
        for omission in plan.left_out:
            self.decide("budget", omission, "not tried", "omitted to keep --time")
        self.trials.measure_base()
        swept = self._sweep_ranks(self._choose_rates())
        swept, choice = self._choose_rank(swept)
        self.tolerance = swept.verdict.tolerance
        incumbent = self._make_incumbent(choice)
        incumbent = self._redistribute(incumbent, choice, swept)
        incumbent = self._stabilize(incumbent, swept)
        self._escalate(incumbent, choice, swept)
        self._finish(incumbent, choice, swept)

    def _run_sweep(self, file: str, **options: Any) -> Results[Any]:
        """Run ``probe sweep``, or resume an interrupted one."""
        run_options, path = self.run_.options, self.folder / file
        names = ("data", "evaluate", "shifted", "batch", "max_sequences", "length", "tokenizer", "dtype", "device")
        shared = {name: run_options[name] for name in (*names, *RUN_OPTIONS)}
        shared |= {
            "engine": self.run_.on,
            "concurrent": run_options["concurrent"],
            "on_progress": self._report_progress,
        }
        self._seen = 0
        with self._limit_time():
            return probe_sweep(self.base, **shared, output=path, resume=path.is_file(), **options)

    def _choose_rates(self) -> tuple[float, ...]:
        """Return the learning rates to try with all steps, after a short round if the plan has one."""
        plan = self.plan
        if not plan.halving:
            return plan.rates
        steps = short_steps(plan.steps)
        ends = sorted({plan.ranks[0], plan.ranks[-1]})
        try:
            results = self._run_sweep("rates.jsonl", ranks=ends, rates=plan.rates, steps=steps, repeats=1, widen=0)
        except TimeIsUpError:
            results = read_results(self.folder / "rates.jsonl")
        of_own_set = [
            record for record in results.whole_of(Probe) if record.set == self.own and record.subject == "lora"
        ]
        losses = {
            (record.rank, record.lr): record.loss
            for record in of_own_set
            if record.rank is not None and record.lr is not None
        }
        rates = halve_rates(losses) or plan.rates
        self.decide(
            "rates",
            "learning rates",
            "chosen",
            f"{', '.join(f'{rate:g}' for rate in rates)} of {len(plan.rates)}: lowest losses after {steps} steps",
            files=("rates.jsonl",),
        )
        return rates

    def _sweep_ranks(self, rates: Sequence[float], **options: Any) -> Swept:
        """Run the sweep over shared ranks or resume it, record its losses, and return it.

        Raises:
            InconclusiveError: No run is finished.
        """
        plan = self.plan
        settings: dict[str, Any] = {
            "ranks": plan.ranks,
            "rates": rates,
            "steps": plan.steps,
            "repeats": plan.repeats,
            "widen": plan.widen,
            **({"full": True, "full_rates": [rate * FULL_OVER_LORA for rate in rates]} if plan.full else {}),
            **options,
        }
        try:
            results = self._run_sweep("sweep.jsonl", **settings)
        except TimeIsUpError:
            self.decide("ranks", "the rest of the sweep", "not tried", "--time was reached")
            results = read_results(self.folder / "sweep.jsonl")
        ranks, seeds = settings["ranks"], range(self.first_seed, self.first_seed + settings["repeats"])
        whole = tuple(
            record
            for record in results.whole_of(Probe)
            if (record.rank is None or record.rank in ranks) and (record.lr is None or record.seed in seeds)
        )  # a resumed sweep may have more
        results = replace(results, whole=whole)
        swept = swept_of(results)
        if swept is None or swept.verdict.best is None:
            raise InconclusiveError(
                f"{self.folder}: no rank is trained with a finite loss; lower --lr, or give more --time"
            )
        self.trials.copy(results.whole_of(Probe), plan, self.target.total)
        return swept

    def _choose_rank(self, swept: Swept) -> tuple[Swept, RankChoice]:
        """Return the shared rank, with more seeds and an intermediate rank where these may decide more."""
        choice = choose_rank(swept.verdict, self._find_best_rates(swept))
        self._record_rank("coarse", choice, swept)
        swept, choice, repeats = self._add_seeds(swept, choice)
        middle = between(choice.rank, swept.ranks) if self.plan.finer else None
        if middle is None:
            return swept, choice
        rates = swept.results.run.settings["rates"]
        if middle not in self._read_swept_setting("ranks") and not self.allows(
            len(rates) + self.plan.widen + repeats - 1
        ):
            self.decide("ranks", f"r={middle}", "not tried", "no time was left", rank=middle)
            return swept, choice
        finer = self._sweep_ranks(rates, ranks=[*self.plan.ranks, middle], repeats=repeats)
        suggested = choose_rank(finer.verdict, self._find_best_rates(finer))
        if choice.significant and not suggested.significant:
            suggested = replace(choice, why=f"r={middle} is not shown to be enough, r={choice.rank} was without it")
        self._record_rank("fine", suggested, finer)
        return finer, suggested

    def _add_seeds(self, swept: Swept, choice: RankChoice) -> tuple[Swept, RankChoice, int]:
        """Return the sweep, the choice and the number of seeds: more of them, where these would make it significant."""
        needed, plan = swept.verdict.more_seeds, self.plan
        if choice.significant or not plan.more_seeds or needed is None:
            return swept, choice, plan.repeats
        why = ""
        if needed > 2 * plan.repeats:
            why = f"about {needed} seeds would decide, more than twice those of the plan"
        elif self._read_swept_setting("seeds") < needed and not self.allows(len(swept.ranks) * (needed - plan.repeats)):
            why = f"no time was left; about {needed} would decide"
        if why:
            self.decide("ranks", "more seeds", "not tried", why, seeds=needed)
            return swept, choice, plan.repeats
        swept_again = self._sweep_ranks(swept.results.run.settings["rates"], repeats=needed)
        repeated = choose_rank(swept_again.verdict, self._find_best_rates(swept_again))
        self._record_rank(f"{needed} seeds", repeated, swept_again)
        return swept_again, repeated, needed

    def _read_swept_setting(self, setting: str) -> Any:
        """Return a setting of the sweep on disk, so that a resumed search decides as the interrupted one."""
        return read_results(self.folder / "sweep.jsonl").run.settings[setting]

    def _find_best_rates(self, swept: Swept) -> dict[int, float]:
        """Return the best learning rate of each shared rank, by the first set and the first seed."""
        rates = best_rates(swept.results.whole_of(Probe), self.run_.sets[0].name, self.first_seed)
        return {rank: rate for rank, rate in rates.items() if rank is not None}

    def _record_rank(self, name: str, choice: RankChoice, swept: Swept) -> None:
        """Record the choice of a shared rank, with its gap to the best."""
        verdict = swept.verdict
        standing = next((item for item in verdict.standings if item.rank == choice.rank), None)
        behind = None if standing is None else standing.behind
        self.decide(
            "ranks",
            f"shared rank, {name}",
            "chosen",
            f"r={choice.rank} of {', '.join(map(str, swept.ranks))}: {choice.why}",
            rank=choice.rank,
            lr=choice.lr,
            params=self.plan.params(choice.rank),
            gap=behind,
            seeds=verdict.seeds,
            files=("sweep.jsonl",),
        )

    def _make_incumbent(self, choice: RankChoice) -> Variant:
        """Return the chosen shared rank as a configuration, trained with its adapter kept."""
        variant = Variant(uniform_name(choice.rank), self.target.config(choice.rank), choice.lr, self.plan.steps)
        self.trials.train(self._make_run_with_adapter(variant))
        return variant

    def _make_run_with_adapter(self, variant: Variant) -> TrialRun:
        """Return the run of a configuration with the first seed, whose adapter is kept; it is not trained here."""
        return TrialRun(variant, self.first_seed, self._adapter_folder(variant))

    def _adapter_folder(self, variant: Variant) -> Path:
        """Return the folder for the adapter of a configuration, and create its parent."""
        folder = self.folder / "trials"
        folder.mkdir(exist_ok=True)
        return folder / variant.name

    # -- non-uniform ranks -------------------------------------------------------------------------------------------

    def _redistribute(self, incumbent: Variant, choice: RankChoice, swept: Swept) -> Variant:
        """Return the better of uniform and non-uniform ranks; uniform wins ties."""
        plan, stage = self.plan, "redistribution"
        if not plan.redistribute:
            return incumbent
        reason = self._explain_no_redistribution(incumbent, swept)
        if reason:
            self.decide(stage, "non-uniform ranks", "not needed", reason)
            return incumbent
        if not self.find_decision(stage, "non-uniform ranks") and not self.allows(3 + plan.repeats):
            self.decide(stage, "non-uniform ranks", "not tried", "no time was left")
            return incumbent
        try:
            with self._limit_time():
                candidates = self._make_candidates(incumbent, choice)
                return self._choose_best(stage, incumbent, candidates, "non-uniform ranks")
        except TimeIsUpError:
            self.decide(stage, "non-uniform ranks", "not tried", "--time was reached during the comparison")
            return incumbent

    def _explain_no_redistribution(self, incumbent: Variant, swept: Swept) -> str:
        """Return why non-uniform ranks are not compared; empty where they are."""
        if len(self.target.shapes) < 2:
            return "one matrix gets an adapter"
        if swept.verdict.outcome == "no gain":
            return f"no rank lowers the loss of BASE, {incumbent.name} neither"
        return ""

    def _make_candidates(self, incumbent: Variant, choice: RankChoice) -> list[Variant]:
        """Train a pilot, and return non-uniform ranks of the same budget, by its spectrum and by gradients at BASE.

        Ranks that PEFT cannot express, or that equal the shared rank, are recorded and left out.
        """
        rank = min(2 * choice.rank, max(min(shape) for shape in self.target.shapes.values()))
        pilot = Variant(f"pilot-r{rank}", self.target.config(rank), choice.lr, self.plan.steps)
        self.trials.train(self._make_run_with_adapter(pilot))
        path = self.folder / "pilot.jsonl"
        spectrum(
            self.base, self._adapter_folder(pilot), output=path, overwrite=True, device=self.run_.options["device"]
        )
        weights = self._measure_gradient_weights()
        budget, minimum = choice.rank * self.plan.per_rank, least_rank(choice.rank)
        strategies: dict[str, dict[str, Any]] = {
            "marginal": {},
            "prior": {"layer_weights": weights, "strategy": "heuristic"},
        }
        candidates = []
        for name, options in strategies.items():
            try:
                allocated = self._allocate_from_pilot(budget, minimum, **options)
                config = self.target.config_of(allocated)
            except LoradiagError as error:
                self.decide("redistribution", name, "not tried", str(error))
                continue
            ranks = {record.rank for record in allocated}
            if ranks == {choice.rank}:
                self.decide("redistribution", name, "not needed", "gives every layer the shared rank")
                continue
            candidates.append(Variant(name, config, incumbent.lr, self.plan.steps))
        return candidates

    def _allocate_from_pilot(self, params: int, min_rank: int, **options: Any) -> Results[Allocation]:
        """Return ranks from the pilot's spectrum."""
        return allocate(self.folder / "pilot.jsonl", params=params, min_rank=min_rank, layers=ALL_LAYERS, **options)

    def _measure_gradient_weights(self) -> Path:
        """Return the file of ‖G‖/‖W‖ by layer, G the gradient at BASE over the first batches of training."""
        path = self.folder / "weights.json"
        if not path.is_file():
            steps = short_steps(self.plan.steps)
            batches = list(replace(self.training, steps=steps).batches())
            sequences = tuple(dict.fromkeys(sequence for batch in batches for sequence in batch))
            texts = replace(self.training.texts, sequences=sequences)
            layers = {f"{module_path}.weight": layer for module_path, layer in self.target.layers.items()}
            gradients_by_layer = gradients(
                self.run_.model, layers, texts, self.training.batch, lambda: self._report_batches("gradient")
            )
            weights = {}
            for name, gradient in gradients_by_layer.items():
                weight = layers[name].get_parameter("weight")
                stored = self.target.stored[name.removesuffix(".weight")]
                weights[stored] = float(gradient.double().norm() / weight.double().norm())
            path.write_text(json.dumps(weights, indent=2) + "\n", encoding="utf-8")
        return path

    # -- contests ----------------------------------------------------------------------------------------------------

    def _choose_best(self, stage: str, incumbent: Variant, candidates: Sequence[Variant], comparison: str) -> Variant:
        """Return the incumbent, or the candidate that beats it.

        The candidate with the lowest loss of the first seed is trained with the other seeds. If it was chosen among
        several, its first seed is not used.
        """
        if not candidates:
            if self.find_decision(stage, comparison) is None:
                self.decide(stage, comparison, "not tried", "no other ranks to try")
            return incumbent
        losses: dict[str, float] = {}
        self.trials.train(*map(self._make_run_with_adapter, candidates))
        for candidate in candidates:
            runs = self.trials.runs(candidate.name, candidate.lr).get(self.own, {})
            if self.first_seed in runs:
                losses[candidate.name] = runs[self.first_seed].loss
        incumbent_loss = self.trials.runs(incumbent.name, incumbent.lr)[self.own][self.first_seed].loss
        best = min(candidates, key=lambda candidate: losses.get(candidate.name, math.inf))
        for candidate in candidates:
            if candidate is not best:
                gap = losses.get(candidate.name, math.inf) - incumbent_loss
                self._record_gap(stage, candidate, "rejected", f"{best.name} has a lower loss at the first seed", gap)
        gap = losses.get(best.name, math.inf) - incumbent_loss
        if gap >= -self.tolerance:
            why = f"{self._find_reason_to_stop()} of {incumbent.name} at the first seed"
            self._record_gap(stage, best, "rejected", why, gap)
            why = f"{incumbent.name} is as good at the same budget{self._describe_cost(candidates)}"
            self.decide(stage, comparison, "rejected", why)
            return incumbent
        kept = self._confirm(stage, incumbent, best, fresh=len(candidates) > 1)
        result = f"{best.name} is better" if kept else f"{incumbent.name} is kept: it wins ties"
        self.decide(stage, comparison, "kept" if kept else "rejected", f"{result}{self._describe_cost(candidates)}")
        return best if kept else incumbent

    def _describe_cost(self, candidates: Sequence[Variant]) -> str:
        """Describe the share of the runs so far that the comparison took: pilot and candidates."""
        names = {variant.name for variant in candidates}
        runs = {(trial.variant, trial.lr, trial.seed) for trial in self.trials.records if trial.variant != "base"}
        comparison_runs = [name for name, _, _ in runs if name in names or name.startswith("pilot-")]
        return f", found with {len(comparison_runs)} of {len(runs)} runs"

    def _find_reason_to_stop(self) -> str:
        """Return why a challenger is not trained further: a gain below the tolerance does not justify it."""
        return f"not ahead by the tolerance of {self.tolerance:.4f} nats" if self.tolerance else "not ahead"

    def _record_gap(self, stage: str, variant: Variant, outcome: str, reason: str, gap: float) -> None:
        """Record the outcome of a configuration from its gap at one seed."""
        finite_gap = gap if math.isfinite(gap) else None
        self.decide(
            stage,
            variant.name,
            outcome,
            reason,
            lr=variant.lr,
            params=self._count_params(variant),
            gap=finite_gap,
            seeds=1,
        )

    def _confirm(self, stage: str, incumbent: Variant, challenger: Variant, fresh: bool) -> bool:
        """Train a challenger and the incumbent with the same seeds; return whether the challenger is kept."""
        seeds = list(range(self.first_seed, self.first_seed + max(self.plan.repeats, 2)))
        if fresh:
            seeds = [*seeds[1:], *([seeds[-1] + 1] if len(seeds) < 3 else [])]
        self.trials.train(*(TrialRun(variant, seed) for seed in seeds for variant in (challenger, incumbent)))
        result = contest(
            self.trials.runs(incumbent.name, incumbent.lr, seeds),
            self.trials.runs(challenger.name, challenger.lr, seeds),
            self.own,
            self.shifted,
            self.trials.predictions,
        )
        reason = {
            "better": f"better than {incumbent.name} significantly, by paired differences",
            "tie": f"not significantly different from {incumbent.name}",
            "worse": f"worse than {incumbent.name} significantly, by paired differences",
            "not known": "too few runs with a loss",
        }[result.outcome]
        if result.outcome == "better" and not result.kept:
            reason += ", but worse on a shifted set"
        self.decide(
            stage,
            challenger.name,
            "kept" if result.kept else "rejected",
            reason,
            lr=challenger.lr,
            params=self._count_params(challenger),
            **_make_gap_fields(result.own, result.shifted),
        )
        return result.kept

    def _count_params(self, variant: Variant) -> int:
        """Return the trainable parameters of a configuration by its records; 0 if it has none."""
        counts = (trial.params for trial in self.trials.records if trial.variant == variant.name)
        return next(counts, 0)

    # -- stability ---------------------------------------------------------------------------------------------------

    def _stabilize(self, incumbent: Variant, swept: Swept) -> Variant:
        """Return the configuration after the trials that the curves justify."""
        reasons = stability_trials(self._collect_curves(incumbent, swept))
        if not reasons:
            self.decide("stability", "curves", "not needed", "training and held-out loss fall together, seeds agree")
            return incumbent
        for name in STABILITY:
            if name not in reasons:
                continue
            trial = change_variant(incumbent, name)
            decision = self.find_decision("stability", trial.name)
            if decision is None and not self._has_time(1 + self.plan.repeats):
                self.decide(
                    "stability", trial.name, "proposed", reasons[name], seconds=self.plan.repeats * self.one_run
                )
                continue
            try:
                with self._limit_time():
                    incumbent = self._judge_trial(incumbent, trial, reasons[name])
            except TimeIsUpError:
                self.decide("stability", trial.name, "proposed", f"{reasons[name]}; --time was reached")
        return incumbent

    def _has_time(self, runs: int) -> bool:
        """Return whether the plan and the time allow another trial, in addition to the seeds of confirmed ones."""
        return self._trained < self.plan.trials and self.allows(runs)

    def _judge_trial(self, incumbent: Variant, trial: Variant, reason: str) -> Variant:
        """Train a stability trial, and return it if it is kept; else the incumbent."""
        self._trained += 1
        self.trials.train(self._make_run_with_adapter(trial))
        trial_run = self.trials.runs(trial.name, trial.lr).get(self.own, {}).get(self.first_seed)
        incumbent_run = self.trials.runs(incumbent.name, incumbent.lr)[self.own][self.first_seed]
        gap = math.inf if trial_run is None else trial_run.loss - incumbent_run.loss
        if gap >= -self.tolerance:
            self._record_gap(
                "stability", trial, "rejected", f"{reason}; {self._find_reason_to_stop()} at the first seed", gap
            )
            return incumbent
        return trial if self._confirm("stability", incumbent, trial, fresh=False) else incumbent

    def _collect_curves(self, incumbent: Variant, swept: Swept) -> Curves:
        """Return the losses of the incumbent and of BASE from which stability is judged."""
        base = {trial.set: trial for trial in self.trials.records if trial.variant == "base"}
        incumbent_records = [
            trial for trial in self.trials.records if (trial.variant, trial.lr) == (incumbent.name, incumbent.lr)
        ]
        on_own_set = [trial for trial in incumbent_records if trial.set == self.own and trial.loss is not None]
        losses = [trial.loss for trial in on_own_set if trial.loss is not None]
        train_losses = [trial.train_loss for trial in on_own_set if trial.train_loss is not None]
        base_record = base[self.own]
        shifted_losses = [
            trial.loss
            for trial in incumbent_records
            if self.shifted and trial.set == self.shifted[0] and trial.loss is not None
        ]
        records = swept.results.whole_of(Probe)
        diverged_runs = {run for run in find_diverged(records) if run[0] == "lora" and (run[2] or 0.0) <= incumbent.lr}
        return Curves(
            base=base_record.loss or 0.0,
            loss=fmean(losses),
            base_train=base_record.train_loss or 0.0,
            train=fmean(train_losses) if train_losses else base_record.train_loss or 0.0,
            spread=stdev(losses) if len(losses) > 1 else None,
            tolerance=swept.verdict.tolerance,
            diverged=len(diverged_runs),
            base_shifted=base[self.shifted[0]].loss if shifted_losses else None,
            shifted=fmean(shifted_losses) if shifted_losses else None,
        )

    # -- escalation --------------------------------------------------------------------------------------------------

    def _escalate(self, incumbent: Variant, choice: RankChoice, swept: Swept) -> None:
        """Estimate the gain of more parameters than the budget, by training where there is time."""
        gain, of_full = self._compute_gains(swept, incumbent)
        share = gain / of_full if of_full else None
        why = escalation_reason(choice.rank, swept.ranks, share)
        if not why:
            has_gain = swept.verdict.outcome != "no gain"
            why = "a rank below the largest is enough" if has_gain else "no rank lowers the loss of BASE"
            self.decide("escalation", "more than LoRA within the budget", "not needed", why)
            return
        for name, build in self._list_escalations(incumbent, choice).items():
            if self.find_decision("escalation", name) is not None:
                continue
            variant, layers = build()
            if variant is None:
                self.decide(
                    "escalation", name, "not needed", "the model has no further layers of this kind", layers=layers
                )
            elif not self._has_time(1):
                self.decide("escalation", name, "proposed", why, seconds=self.one_run, layers=layers)
            else:
                self._test_escalation(name, variant, incumbent, layers)
        self._record_full(swept, incumbent, why)

    def _test_escalation(self, name: str, variant: Variant, incumbent: Variant, layers: tuple[str, ...]) -> None:
        """Train a step beyond the budget with one seed, and record whether it is proposed."""
        self._trained += 1
        try:
            with self._limit_time():
                self.trials.train(TrialRun(variant, self.first_seed))
        except TimeIsUpError:
            self.decide("escalation", name, "proposed", "--time was reached", seconds=self.one_run, layers=layers)
            return
        except LoradiagError as error:
            self.decide("escalation", name, "not tried", str(error), layers=layers)
            return
        runs = [self.trials.runs(candidate.name, candidate.lr, [self.first_seed]) for candidate in (incumbent, variant)]
        gap = self._compute_gap(runs[0], runs[1], self.own)
        shifted_gap = self._compute_gap(runs[0], runs[1], self.shifted[0]) if self.shifted else None
        better = gap is not None and gap.half is not None and gap.value < -gap.half
        reason = "lowers the loss" if better else "does not lower the loss significantly"
        self.decide(
            "escalation",
            name,
            "proposed" if better else "rejected",
            f"trained with one seed: {reason}; outside the budget",
            lr=variant.lr,
            params=self._count_params(variant),
            layers=layers,
            **_make_gap_fields(gap, shifted_gap),
        )

    def _compute_gap(
        self, incumbent_runs: Mapping[str, Any], challenger_runs: Mapping[str, Any], name: str
    ) -> Gap | None:
        """Return the gap of the first seed, with its error over paired sequences; None without both runs."""
        counts = self.trials.predictions.get(name, ())
        incumbent, challenger = (
            incumbent_runs.get(name, {}).get(self.first_seed),
            challenger_runs.get(name, {}).get(self.first_seed),
        )
        if incumbent is None or challenger is None:
            return None
        # As two seeds of the same runs: their spread over seeds is 0, so the error is that over sequences.
        twice: list[dict[int, Measured]] = [{0: incumbent, 1: incumbent}, {0: challenger, 1: challenger}]
        gap = gap_of(twice[0], twice[1], counts)
        return None if gap is None else Gap(gap.value, gap.error or None, 1, gap.half or None)

    def _list_escalations(self, incumbent: Variant, choice: RankChoice) -> dict[str, Callable[[], Any]]:
        """Return the steps beyond the budget in order, each with a function of its configuration and layers."""
        return {
            "higher ranks in named layers": lambda: self._raise_rank(incumbent, choice),
            "more placements": lambda: self._extend_placement(incumbent),
            "biases and norms": lambda: (
                replace(incumbent, name=f"{incumbent.name}+biases-norms", vectors=True),
                (),
            ),
        }

    def _raise_rank(self, incumbent: Variant, choice: RankChoice) -> tuple[Variant | None, tuple[str, ...]]:
        """Return ranks for a larger budget, and the layers that gain most; None without a pilot or such layers."""
        path = self.folder / "pilot.jsonl"
        if not path.is_file():
            return None, ()
        try:
            allocated = self._allocate_from_pilot(round(RAISED_FACTOR * choice.rank * self.plan.per_rank), choice.rank)
            config = self.target.config_of(allocated)
        except LoradiagError:
            return None, ()
        grown = sorted((record for record in allocated if record.rank > choice.rank), key=lambda r: -r.rank)
        if not grown:
            return None, ()
        variant = Variant("higher-ranks", config, incumbent.lr, incumbent.steps, incumbent.decay)
        return variant, tuple(record.layer for record in grown[:MAX_NAMED])

    def _extend_placement(self, incumbent: Variant) -> tuple[Variant | None, tuple[str, ...]]:
        """Return the incumbent with further linear layers, else an untied head, and their names; None without any."""
        layers = {name.removesuffix(".weight") for name in layers_without_head(self.run_.model.module)}
        missing = sorted(layers - set(self.target.layers))
        if not missing:
            module = self.run_.model.module
            head = module.get_output_embeddings()
            tied = getattr(module.config, "tie_word_embeddings", False)
            paths = [path for path, submodule in module.named_modules() if submodule is head and head is not None]
            missing = paths if paths and not tied and type(head).__name__ == "Linear" else []
        if not missing:
            return None, ()
        config = {**incumbent.config, "target_modules": [*incumbent.config["target_modules"], *missing]}
        return replace(incumbent, name=f"{incumbent.name}+placements", config=config), tuple(missing[:MAX_NAMED])

    def _record_full(self, swept: Swept, incumbent: Variant, reason: str) -> None:
        """Record the further gain of full fine-tuning, or its predicted cost."""
        row = self._find_full(swept)
        if row is None:
            seconds = self.plan.steps * (self.plan.full_step_seconds or 3 * self.plan.step_seconds)
            total = self.target.total
            self.decide("escalation", "full fine-tuning", "proposed", reason, params=total, seconds=seconds)
            return
        full = self.trials.runs("full", row.lr)
        incumbent_runs = self.trials.runs(incumbent.name, incumbent.lr)
        result = contest(incumbent_runs, full, self.own, self.shifted, self.trials.predictions)
        self.decide(
            "escalation",
            "full fine-tuning",
            "proposed" if result.outcome == "better" else "rejected",
            {
                "better": "better significantly, by paired differences",
                "tie": "not significantly different",
                "worse": "worse significantly, by paired differences",
                "not known": "too few runs",
            }[result.outcome],
            lr=row.lr,
            params=self.target.total,
            files=("sweep.jsonl",),
            **_make_gap_fields(result.own, result.shifted),
        )

    # -- the end -----------------------------------------------------------------------------------------------------

    def _find_full(self, swept: Swept) -> Any:
        """Return the row of full fine-tuning at its best rate; None if it was not trained."""
        records = swept.results.whole_of(Probe)
        rates = best_rates(records, self.run_.sets[0].name, self.first_seed, "full")
        return next(iter(by_rank(records, self.own, rates, "full")), None)

    def _compute_gains(self, swept: Swept, variant: Variant) -> tuple[float, float | None]:
        """Return the gain of a configuration, and that of full fine-tuning if it gains."""
        base = self._get_base_loss(self.own)
        losses = [run.loss for run in self.trials.runs(variant.name, variant.lr).get(self.own, {}).values()]
        row = self._find_full(swept)
        full = None if row is None or row.mean >= base else base - row.mean
        return base - fmean(losses), full

    def _get_base_loss(self, name: str) -> float:
        """Return the loss of BASE on a set; NaN if it is not finite."""
        loss = next(trial.loss for trial in self.trials.records if trial.variant == "base" and trial.set == name)
        return math.nan if loss is None else loss

    def _finish(self, incumbent: Variant, choice: RankChoice, swept: Swept) -> None:
        """Record the choice, train its adapter if that is missing, and write the outputs."""
        runs = self.trials.runs(incumbent.name, incumbent.lr)
        losses = [run.loss for run in runs[self.own].values()]
        gain, of_full = self._compute_gains(swept, incumbent)
        error = stdev(losses) / math.sqrt(len(losses)) if len(losses) > 1 else None
        rates: dict[int | None, float] = dict(self._find_best_rates(swept).items())
        rows = by_rank(swept.results.whole_of(Probe), self.own, rates)
        above = min((row for row in rows if (row.rank or 0) > choice.rank), key=lambda row: row.rank or 0, default=None)
        shifted_gains, set_shifted = [], self.shifted[0] if self.shifted else ""
        if set_shifted:
            shifted_gains = [self._get_base_loss(set_shifted) - run.loss for run in runs.get(set_shifted, {}).values()]
        redistributed = self.find_decision("redistribution", "non-uniform ranks")
        outcome = None if redistributed is None else redistributed.outcome
        record = Tune(
            set=self.own,
            variant=incumbent.name,
            rank=choice.rank,
            ranks=ranks_of(incumbent.config, self.target.layers) if incumbent.config["rank_pattern"] else {},
            significant=choice.significant and error is not None and gain > errors_needed(len(losses) - 1) * error,
            lr=incumbent.lr,
            steps=incumbent.steps,
            alpha_over_rank=incumbent.alpha_over_rank,
            alpha=float(incumbent.config["lora_alpha"]) if self.target.kind.rslora else None,
            dora=self.target.kind.dora,
            dropout=incumbent.dropout,
            weight_decay=incumbent.decay,
            params=self._count_params(incumbent),
            budget=self.plan.budget,
            base_loss=self._get_base_loss(self.own),
            loss=fmean(losses),
            gain=gain,
            gain_error=error,
            gain_of_full=of_full,
            share_of_full=None if of_full is None else gain / of_full,
            next_rank=None if above is None else above.rank,
            next_gain=None if above is None else fmean(losses) - above.mean,
            non_uniform=outcome if outcome in {"kept", "rejected"} else "not tried",
            gain_shifted=fmean(shifted_gains) if shifted_gains else None,
            gain_shifted_error=stdev(shifted_gains) / math.sqrt(len(shifted_gains)) if len(shifted_gains) > 1 else None,
            set_shifted=set_shifted,
            seeds=len(losses),
        )
        self.kept.put(record)
        adapter = self._adapter_folder(incumbent)
        if not (adapter / ADAPTER).is_file():
            self.trials.train(TrialRun(incumbent, self.first_seed, adapter))
        uniform = self.target.config(choice.rank)
        write_outputs(self.base, self.folder, self.run_, self.plan, incumbent, uniform, record, adapter)


def _make_gap_fields(own: Gap | None, shifted: Gap | None) -> dict[str, Any]:
    """Return the fields of a decision for the comparison of two configurations."""
    return {
        "gap": None if own is None else own.value,
        "error": None if own is None else own.error,
        "gap_shifted": None if shifted is None else shifted.value,
        "error_shifted": None if shifted is None else shifted.error,
        "seeds": 0 if own is None else own.seeds,
    }
