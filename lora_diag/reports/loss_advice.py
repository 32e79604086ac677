"""The rules of advice that stand on held-out losses. They come before those on weights, which are pointers.

Each is silent without its probe's records. A rule names its set and prints the paired standard error, or what seeds
allow to tell apart, because that is what makes a difference one.
"""

from __future__ import annotations

import shlex

from lora_diag.metrics.equivalence import LEVEL
from lora_diag.probes.outputs.choice import Choice, choices
from lora_diag.probes.outputs.contest import ERRORS, KEPT, Contest
from lora_diag.probes.sweep.verdict import SweepVerdict, confident, reasons
from lora_diag.records import Probe
from lora_diag.records.probe import main_sets
from lora_diag.reports.evidence import Evidence
from lora_diag.reports.step import Advice
from lora_diag.reports.worth import SweptRun, compressed, contests, of, swept

_PAIRED = "paired standard error by sequence (Cochran 1977, section 2.11)"


def keep_adapter(evidence: Evidence) -> Advice | None:
    """Nothing has to be done where an adapter does as well as the full fine-tune."""
    good = [contest for contest in contests(evidence) if contest.word == "as good"]
    if not good:
        return None
    best = min(good, key=lambda contest: contest.worst.gap or 0.0)
    others = ", ".join(_told(contest) for contest in good if contest is not best)
    source, records = next(of(evidence, "outputs"))
    on_main = choices([record for record in records if record.set in main_sets(records)])
    which = "".join(f" {_choice(choice)}." for choice in on_main)
    return Advice(
        "keep the adapter",
        f"Nothing: {best.name} does as well as the full fine-tune on held-out text",
        f"{_told(best)}.{f' So do: {others}.' if others else ''}{which} Distances in weights say nothing against that.",
        f"loss + {ERRORS:.0f} standard errors within {1 - KEPT:.0%} of the full fine-tune's gain on every set that is "
        "not shifted, and that gain more than two of its own",
        f"Article, diagnostic 3 (validation loss); {_PAIRED}",
        f"loradiag gate --policy adapter-basic --base {source.given('base')} --adapter {shlex.quote(best.name)}",
    )


def close_gap(evidence: Evidence) -> Advice | None:
    """Every adapter that was measured is worse than the full fine-tune: say by how much, as weights do not."""
    found = contests(evidence)
    if not found or any(contest.word != "worse" for contest in found):
        return None
    best = min(found, key=lambda contest: contest.worst.gap or 0.0)
    return Advice(
        "close the gap",
        f"Close a gap of {_gap(best.worst)} nats to the full fine-tune",
        f"{_told(best)}{', the best of ' + str(len(found)) if len(found) > 1 else ''}. Steps that stand on "
        "weights say where it may lie; train and measure the loss again.",
        f"every adapter worse by more than {ERRORS:.0f} standard errors on some set, and with as many against it "
        f"keeping less than {KEPT:.0%} of the gain",
        f"Article, rank selection step 5 (escalation); {_PAIRED}",
        sweep_of(evidence),
    )


def measure_more(evidence: Evidence) -> Advice | None:
    """Held-out text was too little to tell."""
    found = contests(evidence)
    unknown = [contest for contest in found if contest.word == "not known"]
    if not unknown or any(contest.word == "as good" for contest in found):
        return None
    source, _ = next(of(evidence, "outputs"))
    return Advice(
        "measure more",
        "Measure the loss on more held-out text",
        f"{_told(unknown[0])}: too little to tell whether it does as well as the full fine-tune.",
        f"neither within {1 - KEPT:.0%} of the gain nor worse, with {ERRORS:.0f} standard errors either way",
        _PAIRED,
        f"loradiag probe outputs {source.given('base')} {source.given('tuned')} {shlex.quote(unknown[0].name)} "
        "--eval MORE_TEXT -o outputs.jsonl",
    )


def train_at_rank(evidence: Evidence) -> Advice | None:
    """The rank that a sweep found, with its learning rate; or its best answer, and the seeds that would show it."""
    found = swept(evidence)
    if found is None or found.verdict.word == "no verdict":
        return None
    verdict, base, chosen = found.verdict, found.base, found.verdict.chosen
    many = ", ".join(map(str, found.ranks))
    base_path = found.source.given("base")
    if chosen is None:
        do = "Change the training before the rank: every rank is worse than BASE"
        because = f"On {found.set}, the best of r = {many} is {-verdict.gain:.3g} nats above BASE's {base.nats:.4g}."
        command = sweep_of(evidence, " --lr 1e-6,1e-5,1e-4")
    else:
        at = f"r={chosen.rank} with learning rate {chosen.lr:g}"
        sure = chosen.confidence if verdict.rank is not None else verdict.confidence
        words = "" if sure is None else f", {confident(sure)} confidence"
        more = chosen.rank == found.ranks[-1]
        do = f"Train at {at}{', and try higher ones: the loss still falls there' if more else ''}"
        lead = (
            "the smallest rank shown to keep" if verdict.rank is not None else "the best answer, not shown yet, to keep"
        )
        share = found.tolerance
        shown = f"On {found.set}, of {many} it is {lead} {100 * (1 - share):.4g}% of every other rank's gain{words}"
        because = f"{'; '.join([shown, *reasons(verdict, share)])}."
        command = f"loradiag plan {base_path} --ranks {chosen.rank}"
        if verdict.more_seeds is not None:
            command = continued(found, verdict.more_seeds)
    return Advice(
        f"sweep: {verdict.word}",
        do,
        because,
        f"equivalence test over seeds (one-sided t tests at {LEVEL:.0%}, variance pooled over ranks), each rank at its "
        "best learning rate",
        "Article, diagnostic 3 (rank sweep); Schuirmann 1987",
        command,
    )


def continued(found: SweptRun, seeds: int) -> str:
    """Return the command that adds seeds to a finished sweep."""
    run = found.source.results.run
    settings = run.settings
    sides = [
        f"--{side.role} {shlex.quote(side.path)}" for side in run.inputs if side.role in {"data", "eval", "shifted"}
    ]
    cut = [side.tensors for side in run.inputs if side.role in {"eval", "shifted"} and side.notes]
    options = [f"--max-sequences {max(cut)}"] if cut else []
    listed = {"--ranks": "ranks", "--lr": "rates", "--full-lr": "full_rates"}
    options += [
        f"{option} {','.join(f'{x:g}' for x in settings[key])}" for option, key in listed.items() if settings.get(key)
    ]
    single = ("steps", "batch", "length", "seed", "tolerance", "widen", "quantized", "dtype")
    options += [f"--{key} {settings[key]}" for key in single if settings.get(key) is not None]
    options += ["--full"] if settings.get("full_rates") else []
    options += ["--bitfit"] if settings.get("bitfit") else []
    options += [f"--target {','.join(settings['targets'])}"] if isinstance(settings.get("targets"), list) else []
    options += [f"--{kind.lower()}" for kind in ("DoRA", "rsLoRA") if kind in settings.get("kind", "")]
    words = " ".join(["loradiag probe sweep", found.source.given("base"), *sides, *options])
    return f"{words} --seeds {seeds} --resume -o {shlex.quote(found.source.name)}"


def mind_the_shift(evidence: Evidence) -> Advice | None:
    """A shifted set that a sweep makes worse, or that is shown to ask for more rank."""
    found = swept(evidence)
    if found is None:
        return None
    for name, other in found.shifted.items():
        if other.word == "no gain" and found.verdict.gain > 0:
            do = f"Decide what {name} is worth to you: training makes every rank worse there"
            command = sweep_of(evidence, data="MIXED_TEXT")
            gain = f"for a gain of {found.verdict.gain:.3g} on {found.set}"
            because = f"Least at r={other.best}, by {-other.gain:.3g} nats, {gain}."
        elif other.rank is not None and found.verdict.rank is not None and _not_enough(other, found.verdict.rank):
            do = f"Take r={other.rank} if {name} matters: r={found.verdict.rank} is enough on {found.set} only"
            command = f"loradiag plan {found.source.given('base')} --ranks {found.verdict.rank},{other.rank}"
            because = (
                f"On {name}, r={other.rank} is the smallest rank shown to be enough, and r={found.verdict.rank} is not."
            )
        else:
            continue
        return Advice(
            "mind the shift",
            do,
            because,
            "on a shifted set no rank is better than BASE, or the rank that is enough elsewhere is shown not to be",
            "Article, diagnostic 3 (in-domain and shifted sets); Biderman et al. 2024 (arXiv 2405.09673)",
            command,
        )
    return None


def _not_enough(verdict: SweepVerdict, rank: int) -> bool:
    return any(one.rank == rank and one.enough == "no" for one in verdict.standings)


def compress(evidence: Evidence) -> Advice | None:
    """The full fine-tune itself, cut to a rank."""
    found = compressed(evidence)
    if found is None:
        return None
    kept = min(found.records, key=lambda record: record.kept or 0.0)
    energy = "" if kept.energy is None else f", while C({found.rank}) = {kept.energy:.2f}"
    source = found.source
    # Measured with everything else as in TUNED: without that, the rank keeps less.
    saved = source.results.run.settings.get("rest") == "tuned" and found.without != 0
    rest = " --rest save" if saved else ""
    share = "" if found.without is None else f", which bring {found.without:.0%} of it by themselves"
    alone = f" So measured with TUNED's norms, biases, embeddings and head{share}: they are saved." if saved else ""
    return Advice(
        "compress",
        f"To ship the full fine-tune as an adapter, cut it to r={found.rank}; no training",
        f"It keeps {kept.kept:.0%} of the gain on {kept.set} (loss {_gap(kept)} to the full fine-tune){energy}.{alone}",
        f"smallest rank measured that keeps ≥ {KEPT:.0%} of the gain on every set that is not shifted; that gain more "
        "than two of its standard errors",
        "Eckart & Young 1936; measured, not bounded",
        f"loradiag extract {source.given('base')} {source.given('tuned')} --rank {found.rank}{rest} -o adapter/",
    )


LOSS_RULES = (keep_adapter, close_gap, measure_more, train_at_rank, mind_the_shift, compress)


def _choice(choice: Choice) -> str:
    """Say of a set which adapter is better than every other, or which cannot be told apart."""
    equal = ", ".join(rival.name for rival in choice.equals)
    if not equal:
        return f"On {choice.set}, paired by sequence, {choice.best} is better than every other adapter"
    return f"On {choice.set}, {choice.best} cannot be told from {equal}: use the one that costs least"


def _told(contest: Contest) -> str:
    """Say how an adapter does where it does worst."""
    record = contest.worst
    kept = "" if record.kept is None else f", {record.kept:.0%} of its gain"
    return f"{contest.name} is {_gap(record)} nats from the full fine-tune on {record.set}{kept}"


def _gap(record: Probe) -> str:
    error = "" if record.gap_error is None else f" ± {record.gap_error:.2g}"
    return f"{record.gap or 0.0:+.4f}{error}"


def sweep_of(evidence: Evidence, more: str = "", data: str | None = None) -> str:
    """Return the command of a rank sweep on the inputs that the records name; what they do not is in capitals."""
    found = swept(evidence)
    texts = [
        f"--{role} {shlex.quote(side.path)}"
        for side in (found.source.results.run.inputs if found else ())
        for role in ("eval", "shifted")
        if side.role == role
    ]
    base = found.source.given("base") if found else _any(evidence, "base")
    trained = data or (found.source.given("data") if found else "TRAIN_TEXT")
    held_out = " ".join(texts) or "--eval HELD_OUT_TEXT"
    if found:
        more += f" --ranks {','.join(map(str, found.ranks))}"
        more += f" --steps {steps}" if (steps := found.source.results.run.settings.get("steps")) else ""
    return f"loradiag probe sweep {base} --data {trained} {held_out}{more} -o {'sweep-2' if found else 'sweep'}.jsonl"


def _any(evidence: Evidence, role: str) -> str:
    """Return the first input of a role in any of the runs."""
    named = (word for source in evidence.sources if (word := source.given(role)) != role.upper())
    return next(named, role.upper())
