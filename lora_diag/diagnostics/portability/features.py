"""Treatment of each adapter feature by each consumer and version, computed from the rules."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from lora_diag.adapters.contents import Contents, Item, Part
from lora_diag.diagnostics.portability.consumers import CONSUMERS
from lora_diag.diagnostics.portability.measure import PortabilitySettings, judge
from lora_diag.diagnostics.portability.record import NONLINEAR_PARTS, Portability
from lora_diag.diagnostics.portability.rules import Consumer, Rule
from lora_diag.diagnostics.portability.run import judged
from lora_diag.rendering.columns import Column, Grid
from lora_diag.rendering.text import number

_Q, _V = "model.layers.0.self_attn.q_proj", "model.layers.0.self_attn.v_proj"
_CONFIG = {"peft_type": "LORA", "r": 8, "lora_alpha": 16, "target_modules": ["q_proj", "v_proj"]}


def _pair(module: str, rank: int, scale: float, alpha: float | None = None, part: Part = "factors") -> Item:
    return Item(f"{module}.weight", module, part, f"{module}.lora_B.weight", rank, scale, alpha, (16, 16))


def _make_peft_contents(
    config: Mapping[str, Any], ranks: tuple[int, int], scales: tuple[float, float], *extra: Item
) -> Contents:
    items = _pair(_Q, ranks[0], scales[0]), _pair(_V, ranks[1], scales[1])
    return Contents("peft", (*items, *extra), {**_CONFIG, **config})


def _make_kohya_contents(*pairs: tuple[int, float, float | None]) -> Contents:
    items = (_pair(f"lora_unet_block_{n}", *pair) for n, pair in enumerate(pairs))
    return Contents("kohya", tuple(items))


# Feature -> an adapter of two layers with only this feature, and the intended scales.
FEATURES: dict[str, Contents] = {
    "one rank, one alpha": _make_peft_contents({}, (8, 8), (2.0, 2.0)),
    "rsLoRA": _make_peft_contents({"use_rslora": True}, (8, 8), (16 / 8**0.5, 16 / 8**0.5)),
    "rank_pattern": _make_peft_contents({"rank_pattern": {"layers.0.self_attn.q_proj": 4}}, (4, 8), (4.0, 2.0)),
    "alpha_pattern": _make_peft_contents({"alpha_pattern": {"layers.0.self_attn.q_proj": 32}}, (8, 8), (4.0, 2.0)),
    "both, alpha = rank": _make_peft_contents(
        {"lora_alpha": 8, "rank_pattern": {"q_proj": 4}, "alpha_pattern": {"q_proj": 4}}, (4, 8), (1.0, 1.0)
    ),
    "anchored pattern (^)": _make_peft_contents({"alpha_pattern": {f"^{_Q}": 32}}, (8, 8), (4.0, 2.0)),
    "target_modules is a regex": _make_peft_contents({"target_modules": ".*(q|v)_proj"}, (8, 8), (2.0, 2.0)),
    "q_proj without v_proj": Contents("peft", (_pair(_Q, 8, 2.0),), _CONFIG),
    "embeddings (untied head)": replace(
        _make_peft_contents(
            {"target_modules": ["q_proj", "v_proj", "embed_tokens"]},
            (8, 8),
            (2.0, 2.0),
            _pair("model.embed_tokens", 8, 2.0, part="embedding"),
        ),
        tied=False,
    ),
    "target_parameters (experts)": _make_peft_contents(
        {}, (8, 8), (2.0, 2.0), _pair("model.layers.0.mlp.experts.down_proj", 8, 2.0, part="experts")
    ),
    "DoRA": Contents(
        "peft",
        tuple(_pair(module, 8, 2.0, part="dora") for module in (_Q, _V)),
        {**_CONFIG, "use_dora": True},
    ),
    "lora_bias": _make_peft_contents(
        {"lora_bias": True}, (8, 8), (2.0, 2.0), Item(f"{_Q}.bias", _Q, "bias", f"{_Q}.lora_B.bias")
    ),
    "modules_to_save": _make_peft_contents(
        {"modules_to_save": ["lm_head"]},
        (8, 8),
        (2.0, 2.0),
        Item("lm_head.weight", "lm_head", "value", "lm_head.weight"),
    ),
    "PiSSA, not converted": Contents(
        "peft",
        tuple(_pair(module, 8, 2.0, part="residual") for module in (_Q, _V)),
        {**_CONFIG, "init_lora_weights": "pissa"},
    ),
    "no alpha, unequal ranks": _make_kohya_contents((16, 1.0, None), (4, 1.0, None)),
    "one alpha, unequal ranks": _make_kohya_contents((16, 0.25, 4.0), (4, 1.0, 4.0)),
    "alpha in some modules": _make_kohya_contents((16, 0.25, 4.0), (16, 1.0, None)),
}


def outcome(contents: Contents, consumer: Consumer, rule: Rule) -> list[Portability]:
    """Return the records of one consumer and version for an adapter without weights."""
    name = consumer.name, rule.read[-1]
    records: list[Portability] = []
    for task in judged(contents, {name: (consumer, rule)}):
        records += [record for record in judge(task, PortabilitySettings()) if isinstance(record, Portability)]
    return records


def words(records: list[Portability]) -> str:
    """Return a short description of a consumer's treatment of an adapter: that of the worst weight."""
    statuses = {record.status for record in records}
    if "refused" in statuses:
        return "refuses"
    if "dropped" in statuses:
        return "drops"
    if "wrong" in statuses:
        if any(record.part in NONLINEAR_PARTS for record in records):
            return "B·A alone"
        factors = (r.scale / r.intended for r in records if r.status == "wrong" and r.scale and r.intended)
        return ", ".join(f"×{number(factor)}" for factor in sorted(set(factors)))
    return "exact"


def rules_grids() -> list[Grid]:
    """Return two tables per file layout, of the newest and of older rules, with one row per feature."""
    grids = []
    for form in dict.fromkeys(contents.form for contents in FEATURES.values()):
        features = {name: contents for name, contents in FEATURES.items() if contents.form == form}
        readers = [consumer for consumer in CONSUMERS.values() if form in consumer.forms]
        newest = [_make_column(consumer, consumer.rules[0], features) for consumer in readers]
        older = [_make_column(consumer, rule, features) for consumer in readers for rule in consumer.rules[1:]]
        grids.append(Grid(f"Files of {form}", "feature", tuple(features), tuple(newest)))
        grids.append(Grid(f"Files of {form}, older versions", "feature", tuple(features), tuple(older)))
    return grids


def _make_column(consumer: Consumer, rule: Rule, features: Mapping[str, Contents]) -> Column:
    cells = tuple(words(outcome(contents, consumer, rule)) for contents in features.values())
    return Column(f"{consumer.title} {rule.versions}".removesuffix(" all"), cells, "left")


def history(contents: Contents, consumer: Consumer) -> str:
    """Return a consumer's treatment of an adapter by version, such as ``exact since 0.32, before ×0.5``.

    Rules that do the same are one range of versions.
    """
    spans: list[tuple[str, str]] = []  # the first known version of each behaviour, newest first
    for rule in consumer.rules:
        done = words(outcome(contents, consumer, rule))
        if spans and spans[-1][1] == done:
            spans[-1] = rule.since, done
        else:
            spans.append((rule.since, done))
    if len(spans) == 1:
        return spans[0][1]
    *newer, (_, oldest) = spans
    return f"{', '.join(f'{done} since {since}' for since, done in newer)}, before {oldest}"


def history_table(form: str) -> str:
    """Return a Markdown table of a file layout: one row per feature, one column per consumer that reads it."""
    features = {name: contents for name, contents in FEATURES.items() if contents.form == form}
    readers = [consumer for consumer in CONSUMERS.values() if form in consumer.forms]
    rows = [["feature of the adapter", *(consumer.title for consumer in readers)], ["---"] * (len(readers) + 1)]
    rows += [[name, *(history(contents, consumer) for consumer in readers)] for name, contents in features.items()]
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)
