"""``lint``: open what is given, judge every rule, and return or write the findings."""

from __future__ import annotations

from dataclasses import replace
from inspect import signature
from itertools import islice
from pathlib import Path
from typing import Any, Unpack

from lora_diag.adapters import Input, locate, read_adapter
from lora_diag.adapters.source import ADAPTER_WEIGHTS, CONFIG, Config, open_source
from lora_diag.cli.output import append_step_summary
from lora_diag.decisions.plan.measure import open_headers
from lora_diag.diagnostics.portability.consumers import CONSUMERS
from lora_diag.errors import Given, InputError, NothingComparedError, UsageError, flag, shorten
from lora_diag.explanations.terms import remedy_of
from lora_diag.files import JUNIT, RESULTS, check_outputs, write_whole
from lora_diag.linting import LintOptions
from lora_diag.linting.configs import (
    SUFFIXES,
    TRAINING_ARGS,
    Settings,
    name_optimizer,
    read_settings,
)
from lora_diag.linting.record import SEVERITIES, LintFinding
from lora_diag.linting.rules import MISSING, RULES, Facts
from lora_diag.linting.show import as_verdicts, lint_summary
from lora_diag.records import End, Results, Run, RunInput
from lora_diag.records.file import write_results
from lora_diag.records.run import timestamp
from lora_diag.rendering.verdicts import junit
from lora_diag.running.amounts import read_bytes, read_count
from lora_diag.running.fingerprint import legible
from lora_diag.running.inputs import describe, pair_update
from lora_diag.running.options import fill_options, show_options
from lora_diag.version import __version__

# Findings of one rule, of which a hostile configuration has any number.
MAX_FINDINGS = 20

# Options that are LoRA settings, with their keys in ``adapter_config.json``.
_LORA_KEYS = {"rank": "r", "alpha": "lora_alpha"}


@show_options
def lint(
    base: Path | str | None = None, config: Path | str | None = None, **options: Unpack[LintOptions]
) -> Results[Any]:
    """Return what will go wrong in training, from BASE, a configuration and options.

    Of BASE only headers and sampled ranges of entries are read, of a saved adapter its factors.

    Args:
        base: A checkpoint, or its ``config.json``; without it, rules that need it are not judged.
            Or the configuration alone.
        config: An adapter's folder, ``adapter_config.json``, a configuration of a trainer, or
            ``training_args.bin``.
        finetuning_type: ``lora`` or ``full``.
        lr: Peak learning rate.
        rank: Rank of the adapter.
        alpha: ``lora_alpha``.
        dtype: Dtype of the trained weights.
        optimizer: Name of the optimizer.
        steps: Number of steps.
        tokens: Predicted tokens of the training data, such as ``"2M"``.
        gpu_memory: Memory of the GPU, such as ``"24GB"``.
        consumers: Programs that will serve the adapter; their findings are then errors.
        fail_on: Least severity of a finding that fails.
        output: Results file to write.
        junit: JUnit report to write.
        github: Append to the step summary of GitHub Actions; the command also prints annotations.
        overwrite: Replace an existing output.
        **options: ``LintOptions``.

    Returns:
        Findings, the worst first, then the fractions of entries that a step moves, in ``whole``.
            The settings of the
        run name the rules that were judged, and what is missing to judge others.

    Raises:
        UsageError: An option is invalid, nothing is given, or an output may not be replaced.
        InputError: An input cannot be read, or an output cannot be written.

    Example:
        >>> found = lint("sample_checkpoints/base", "sample_checkpoints/lora_r4", alpha=1)
        >>> [(finding.id, finding.severity) for finding in found.whole_of(LintFinding)]
        []
    """
    options = fill_options(LintOptions, options)
    unknown = [name for name in options["consumers"] if name not in CONSUMERS]
    if unknown:
        raise UsageError(
            Given("consumers", unknown[0]), "unknown program", f"give one of {', '.join(CONSUMERS)}"
        )
    tokens, memory = options["tokens"], options["gpu_memory"]
    token_count = None if tokens is None else read_count(str(tokens), "tokens")
    memory_bytes = None if memory is None else read_bytes(memory, "gpu_memory")
    output, report, overwrite = options["output"], options["junit"], options["overwrite"]
    check_outputs([config, base], [(output, RESULTS), (report, JUNIT)], overwrite)
    base, source = _order_inputs(base, config)
    settings = Settings(Path(), "options", Config(Path("options"), {}))
    if source is not None:
        settings = _read_settings(source)
    settings = _apply_options(settings, options)
    checkpoint = None if base is None else open_headers(base)
    facts = Facts(
        settings,
        checkpoint,
        tokens=token_count,
        gpu_memory=memory_bytes,
        consumers=options["consumers"],
    )
    if source is not None and _holds_adapter(source):
        facts = _open_saved(source, facts)
    findings, judged, missing = _judge(facts)
    inputs = list[RunInput]()
    if source is not None:
        path, kind = legible(source.path), settings.family
        inputs.append(RunInput(role="config", path=path, kind=kind, tensors=0))
    if checkpoint is not None:
        inputs.append(describe("base", checkpoint))
    own = {
        "judged": judged,
        "not_judged": missing,
        "fail_on": options["fail_on"],
        "lr": settings.lr,
    }
    run = Run(
        command="lint", version=__version__, inputs=tuple(inputs), settings=own, made=timestamp()
    )
    end = End(layers=0, left_out=0, fro=None, base_fro=None)
    shares = facts.steps[1] if settings.finetuning_type == "full" and facts.steps else []
    results = Results[Any](run, (), (), end, (*findings, *shares))
    if output is not None:
        write_results(results, output, overwrite)
    if report is not None:
        write_whole(report, junit(as_verdicts(results)), JUNIT, overwrite)
    if options["github"]:
        append_step_summary(lint_summary(results))
    return results


def _order_inputs(
    base: Path | str | None, config: Path | str | None
) -> tuple[Path | str | None, Input | None]:
    """Return BASE and CONFIG, where a single path may be either.

    Raises:
        UsageError: There is neither, or BASE is a configuration.
        InputError: CONFIG does not exist, or cannot be fetched or reached.
    """
    if config is not None:
        if base is not None and _is_config(Path(base)):
            raise UsageError(
                f"{base}: is a configuration, not BASE; the order is: loradiag lint [BASE] CONFIG"
            )
        return base, locate(config)
    if base is None:
        raise UsageError("lint: give BASE, a configuration, or both")
    source = locate(base)
    if source.is_adapter or _is_config(source.path):
        return None, source
    return base, None


def _is_config(path: Path) -> bool:
    """Return whether the name of a file is that of a configuration, and not that of BASE."""
    is_base = path.name == "config.json" or path.name.endswith(".index.json")
    return path.name == TRAINING_ARGS or (path.suffix in SUFFIXES and not is_base)


def _is_without_config(source: Input) -> bool:
    """Return whether the input is an adapter's weights file, or a folder without PEFT's config."""
    if source.files.suffix in SUFFIXES or (source.files / CONFIG).is_file():
        return False
    return source.is_adapter


def _holds_adapter(source: Input) -> bool:
    """Return whether the input has the weights of an adapter, and not only its config."""
    named = any((source.files / name).is_file() for name in ADAPTER_WEIGHTS)
    return named or _is_without_config(source)


def _read_settings(source: Input) -> Settings:
    """Return the settings of a configuration; an adapter without one says only that it is one."""
    if _is_without_config(source):
        empty = Config(Path("options"), {})
        return Settings(source.files, "adapter", empty, finetuning_type="lora")
    return read_settings(source.files)


def _apply_options(settings: Settings, options: LintOptions) -> Settings:
    """Return settings with the values of options."""
    given: dict[str, Any] = {name: value for name, value in options.items() if value is not None}
    if "optimizer" in given:
        given["optimizer"] = name_optimizer(given["optimizer"])
    own: dict[str, Any] = {}
    lora: dict[str, Any] = {}
    flags: dict[str, str] = {}
    for name, value in given.items():
        if name in ("finetuning_type", "lr", "dtype", "steps", "optimizer"):
            own[name] = value
            flags[name] = flag(name)
        elif name in _LORA_KEYS:
            key = _LORA_KEYS[name]
            lora[key] = value
            flags[key] = f"--{name}"
    peft = Config(settings.peft.path, {**settings.peft.values, **lora})
    defaults = settings.defaults - lora.keys()
    return replace(settings, **own, peft=peft, keys={**settings.keys, **flags}, defaults=defaults)


def _open_saved(source: Input, facts: Facts) -> Facts:
    """Return the facts with a saved adapter, or why it does not fit its config or BASE."""
    try:
        facts = replace(facts, adapter=read_adapter(source), mismatch="")
        if facts.adapter is None or facts.base is None or facts.weights is None:
            return facts
        return replace(facts, pairing=pair_update(facts.base, facts.adapter)[0])
    except (InputError, NothingComparedError) as error:
        open_source(source)  # raises if the files are unreadable, and not only unlike the config
        if facts.adapter is None and facts.settings.finetuning_type != "lora":
            raise
        return replace(facts, mismatch=str(error))


def _judge(facts: Facts) -> tuple[list[LintFinding], list[str], dict[str, str]]:
    """Return the findings, the rules that were judged, and what to give for those that were not."""
    findings, judged, missing = list[LintFinding](), list[str](), dict[str, str]()
    for name, rule in RULES.items():
        if rule.method and facts.settings.finetuning_type not in {rule.method, None}:
            continue
        known = {need: getattr(facts, need) for need in signature(rule.check).parameters}
        lacking = next((need for need, value in known.items() if value is None), None)
        if lacking is not None:
            missing[name] = MISSING.get(lacking, f"--{lacking}".replace("_", "-"))
            continue
        if rule.method and facts.settings.finetuning_type is None:
            missing[name] = "--finetuning-type"
            continue
        judged.append(name)
        fix, source = remedy_of(name)
        problems = [*islice(rule.check(**known), MAX_FINDINGS + 1)]
        if len(problems) > MAX_FINDINGS:
            last = problems[MAX_FINDINGS - 1]
            evidence = f"{last.evidence}; and more, which are not listed"
            problems[MAX_FINDINGS - 1 :] = [last._replace(evidence=evidence)]
        for key, evidence, severity in problems:
            where, line = facts.settings.locate(key)
            finding = LintFinding(
                id=name,
                severity=severity or rule.severity,
                where=where,
                line=line,
                evidence=shorten(evidence),
                fix=fix,
                source=source,
            )
            findings.append(finding)
    return sorted(findings, key=lambda finding: SEVERITIES.index(finding.severity)), judged, missing
