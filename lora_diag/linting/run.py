"""``lint``: open what is given, judge every rule, and return the findings."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, Unpack

from lora_diag.adapters import is_adapter, open_adapter
from lora_diag.adapters.source import ADAPTER_WEIGHTS, CONFIG, Config, open_source
from lora_diag.checkpoints import as_path, locate
from lora_diag.decisions.plan.measure import open_headers
from lora_diag.diagnostics.portability.consumers import CONSUMERS
from lora_diag.errors import InputError, NothingComparedError, UsageError
from lora_diag.explanations.terms import remedy_of
from lora_diag.linting import LintOptions
from lora_diag.linting.configs import SUFFIXES, TRAINING_ARGS, Settings, name_optimizer, read_settings
from lora_diag.linting.record import SEVERITIES, Finding
from lora_diag.linting.rules import MISSING, RULES, Facts, Rule
from lora_diag.records import End, Results, Run, RunInput
from lora_diag.records.run import timestamp
from lora_diag.running.amounts import read_bytes, read_count
from lora_diag.running.fingerprint import legible
from lora_diag.running.inputs import describe, pair_update
from lora_diag.running.options import fill_options, show_options
from lora_diag.version import __version__

# Options that are LoRA settings, with their keys in ``adapter_config.json``.
_FACTORS = {"rank": "r", "alpha": "lora_alpha"}


@show_options
def lint(
    config: Path | str | None = None, base: Path | str | None = None, **options: Unpack[LintOptions]
) -> Results[Any]:
    """Return what will go wrong in training, from a configuration, BASE and options.

    Of BASE only headers and sampled ranges of entries are read, of a saved adapter its factors.

    Args:
        config: An adapter's folder, ``adapter_config.json``, a configuration of a trainer, or ``training_args.bin``.
        base: A checkpoint, or its ``config.json``; without it, rules that need it are not judged.
        method: ``lora`` or ``full``.
        lr: Peak learning rate.
        rank: Rank of the adapter.
        alpha: ``lora_alpha``.
        dtype: Dtype of the trained weights.
        optimizer: Name of the optimizer.
        steps: Number of steps.
        tokens: Predicted tokens of the training data, such as ``"2M"``.
        gpu_memory: Memory of the GPU, such as ``"24GB"``.
        servers: Programs that will serve the adapter; their findings are then errors.
        **options: ``LintOptions``.

    Returns:
        Findings, the worst first, then the fractions of entries that a step moves, in ``whole``. The settings of the
        run name the rules that were judged, and what is missing to judge others.

    Raises:
        UsageError: An option is invalid, nothing is given, or PyYAML is missing.
        InputError: An input cannot be read.

    Example:
        >>> found = lint("sample_checkpoints/lora_r4", "sample_checkpoints/base", alpha=1)
        >>> [(finding.id, finding.severity) for finding in found.whole_of(Finding)]
        []
    """
    arguments = fill_options(LintOptions, options)
    if unknown := [name for name in arguments["servers"] if name not in CONSUMERS]:
        raise UsageError(f"--servers {unknown[0]}: unknown program; give one of {', '.join(CONSUMERS)}")
    tokens, memory = arguments["tokens"], arguments["gpu_memory"]
    tokens = None if tokens is None else read_count(str(tokens), "--tokens")
    if memory is not None:
        memory = read_bytes(f"{memory}B" if isinstance(memory, int) else memory, "--gpu-memory")
    config, base = _order_inputs(config, base)
    path = None if config is None else locate(as_path(config))
    settings = Settings(path or Path(), "options", Config(Path("options"), {}))
    if path is not None:  # an adapter without a config says only that it is one
        settings = replace(settings, family="adapter", method="lora") if _is_weights(path) else read_settings(path)
    settings = _apply_options(settings, arguments)
    checkpoint = None if base is None else open_headers(base)
    facts = Facts(settings, checkpoint, tokens=tokens, memory=memory, servers=arguments["servers"])
    if path is not None and (_is_weights(path) or any((path / name).is_file() for name in ADAPTER_WEIGHTS)):
        facts = _open_saved(path, facts)
    findings, judged, missing = _judge(facts)
    inputs = [] if config is None else [RunInput(role="config", path=legible(config), kind=settings.family, tensors=0)]
    inputs += [] if checkpoint is None else [describe("base", checkpoint)]
    run = Run(
        command="lint",
        version=__version__,
        inputs=tuple(inputs),
        settings={"judged": judged, "not_judged": missing, "method": settings.method, "lr": settings.lr},
        made=timestamp(),
    )
    end = End(layers=0, left_out=0, fro=None, base_fro=None)
    return Results(run, (), (), end, (*findings, *(facts.shares if settings.method == "full" else ())))


def _order_inputs(config: Path | str | None, base: Path | str | None) -> tuple[Path | str | None, Path | str | None]:
    """Return CONFIG and BASE, where a single path may be either.

    Raises:
        UsageError: There is neither.
    """
    if config is None and base is None:
        raise UsageError("lint: give a configuration, BASE, or both")
    if config is None or base is not None:
        return config, base
    path = as_path(config)
    is_config = path.name == TRAINING_ARGS or (path.suffix in SUFFIXES and path.name != "config.json")
    if (is_config and not path.name.endswith(".index.json")) or is_adapter(locate(path)):
        return config, None
    return None, config


def _is_weights(path: Path) -> bool:
    """Return whether a path is an adapter's weights file, or a folder without PEFT's config."""
    return path.suffix not in SUFFIXES and not (path / CONFIG).is_file() and is_adapter(path)


def _apply_options(settings: Settings, options: Mapping[str, Any]) -> Settings:
    """Return settings with the values of options."""
    given = {name: value for name, value in options.items() if value is not None}
    own: dict[str, Any] = {name: given[name] for name in ("method", "lr", "dtype", "steps") if name in given}
    own |= {"optimizer": name_optimizer(given["optimizer"])} if "optimizer" in given else {}
    factors = {key: given[name] for name, key in _FACTORS.items() if name in given}
    flags = {_FACTORS.get(name, name): f"--{name}" for name in (*own, *_FACTORS) if name in given}
    return replace(
        settings,
        **own,
        peft=Config(settings.peft.path, {**settings.peft.values, **factors}),
        keys={**settings.keys, **flags},
        defaults=settings.defaults - factors.keys(),
    )


def _open_saved(path: Path, facts: Facts) -> Facts:
    """Return the facts with a saved adapter, or why it does not fit its config or BASE.

    Raises:
        InputError: Its files cannot be read.
    """
    try:
        adapter = open_adapter(path)
    except InputError as error:
        open_source(path)  # raises if the files are unreadable, and not only unlike the config
        if facts.settings.method != "lora":
            raise
        return replace(facts, mismatch=str(error))
    facts = replace(facts, adapter=adapter)
    if facts.base is None or facts.entries is None:
        return facts
    try:
        return replace(facts, pairing=pair_update(facts.base, adapter)[0])
    except (InputError, NothingComparedError) as error:
        return replace(facts, mismatch=str(error))


def _judge(facts: Facts) -> tuple[list[Finding], list[str], dict[str, str]]:
    """Return the findings, the rules that were judged, and what to give for those that were not."""
    findings, judged, missing = list[Finding](), list[str](), dict[str, str]()
    for rule in RULES.values():
        if rule.method and facts.settings.method is not None and rule.method != facts.settings.method:
            continue
        lacking = [MISSING.get(name, f"--{name}") for name in rule.needs if getattr(facts, name) is None]
        lacking += ["--method"] if rule.method and facts.settings.method is None else []
        if lacking:
            missing[rule.id] = lacking[0]
            continue
        judged.append(rule.id)
        findings += _find(rule, facts)
    return sorted(findings, key=lambda finding: SEVERITIES.index(finding.severity)), judged, missing


def _find(rule: Rule, facts: Facts) -> Iterator[Finding]:
    """Yield the findings of one rule."""
    fix, source = remedy_of(rule.id)
    for key, evidence, severity in rule.check(facts):
        where, line = facts.settings.locate(key)
        severity = severity or rule.severity
        yield Finding(id=rule.id, severity=severity, where=where, line=line, evidence=evidence, fix=fix, source=source)
