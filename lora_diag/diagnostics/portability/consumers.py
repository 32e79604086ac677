r"""Consumers, the programs that load adapters: their rules as pure functions of an adapter file's
contents.

A rule holds for a range of versions. The comment above each program states where its rules were
read: project, file, function, version and date. A new program is its functions and one entry in
``CONSUMERS``.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from itertools import zip_longest
from typing import Any, Literal

from lora_diag.adapters.contents import PAIRS, Contents, Item, parse_component
from lora_diag.adapters.layouts import GGUF, why_not_tied
from lora_diag.errors import Given, UsageError

_VERSION = re.compile(r"b?(\d+(?:\.\d+)*)(?:[.-]?(?:post|rc|dev|a|b)\d*)*")


@dataclass(frozen=True, slots=True)
class Outcome:
    """Treatment of one item by a consumer.

    Args:
        does: ``applied`` if it adds ``scale``·B·A; ``intended`` if it applies the item as stored;
            ``full`` if it takes a stored weight; ``dropped`` if it leaves the weight as it is;
            ``refused`` if it does not load the adapter.
        scale: s'; None without factors, and if dropped or refused.
        why: The reason, in one sentence; empty for the usual case.
        unjudged: What may prevent it, which depends on a BASE that is not given or on what no file
            says; empty if nothing does.
    """

    does: Literal["applied", "intended", "full", "dropped", "refused"]
    scale: float | None = None
    why: str = ""
    unjudged: str = ""


@dataclass(frozen=True, slots=True)
class ConsumerRule:
    """Behaviour of some versions of a consumer.

    Args:
        since: First version for which it holds; empty if it holds for all older versions, as far as
            known.
        until: First version for which it no longer holds; empty if it holds up to the newest
            version read.
        read: Versions whose source was read, the newest last.
        applies: Returns the treatment of an item of a loaded adapter.
        refusals: Returns the reasons for not loading an adapter; none if it is loaded.
        unjudged: Returns what is not known of an adapter without its BASE; empty if nothing.
    """

    since: str
    until: str
    read: tuple[str, ...]
    applies: Callable[[Contents, Item], Outcome]
    refusals: Callable[[Contents], Iterable[str]] = lambda contents: ()
    unjudged: Callable[[Contents], str] = lambda contents: ""

    @property
    def versions(self) -> str:
        """The range, such as ``< 0.32``; of rules from the newest to the oldest, the first that
        holds applies.
        """
        if self.until:
            return f"< {self.until}"
        return f"≥ {self.since}" if self.since else "all"

    def refuses(self, contents: Contents) -> str:
        """Return the reason for not loading an adapter; empty if it is loaded."""
        return join_reasons(*self.refusals(contents))


@dataclass(frozen=True, slots=True)
class Consumer:
    """A program that loads adapters.

    Args:
        name: Name for ``--consumers``.
        title: Name in tables and figures.
        forms: Layouts of files that it reads, such as ``peft`` or ``gguf``.
        rules: Its rules, the newest first.
        largest_rank: Largest rank that it can be set to serve; None if there is no limit.
        default_rank: Largest rank that it serves by default; None if there is no limit.
        rank_option: The option that sets the largest rank; empty without one.
        rank_choices: Values that this option accepts; empty if any.
    """

    name: str
    title: str
    forms: frozenset[str]
    rules: tuple[ConsumerRule, ...]
    largest_rank: int | None = None
    default_rank: int | None = None
    rank_option: str = ""
    rank_choices: tuple[int, ...] = ()

    @property
    def newest(self) -> str:
        """The newest version that was read."""
        return self.rules[0].read[-1]

    def find_rule(self, version: str) -> ConsumerRule:
        """Return the rule for a version; the newest if the version is empty.

        Raises:
            UsageError: The text is not a version, or is older than every rule.
        """
        if not version:
            return self.rules[0]
        for rule in self.rules:
            if version in rule.read:
                return rule  # a commit is not a number
        if not _VERSION.fullmatch(version):
            raise UsageError(
                Given("consumers", f"{self.name}=={version}"),
                "not a version",
                f"give one such as {self.newest}",
            )
        for rule in self.rules:
            if not rule.since or not is_before(version, rule.since):
                return rule
        raise UsageError(
            Given("consumers", f"{self.name}=={version}"),
            "no rule is known for it",
            f"the oldest is for {self.rules[-1].versions}",
        )

    def is_newer(self, version: str) -> bool:
        """Return whether a version is newer than all versions read; False for rules of commits,
        which have no order.
        """
        return bool(version) and bool(self.rules[0].since) and is_before(self.newest, version)

    def find_rank_to_set(self, contents: Contents) -> int | None:
        """Return the rank that the consumer must be configured to serve; None if its default
        suffices.
        """
        rank = find_largest_rank(contents)
        if self.default_rank is None or rank <= self.default_rank:
            return None
        return next((choice for choice in self.rank_choices if choice >= rank), rank)


def is_before(first: str, second: str) -> bool:
    """Return whether a version is before another, part by part.

    >>> is_before("0.31.2", "0.32"), is_before("0.32", "0.32.0"), is_before("0.9", "0.10")
    (True, False, True)
    """
    parts = []
    for text in (first, second):
        numbers = _VERSION.fullmatch(text)[1]  # type: ignore[index]
        parts.append([int(part) for part in numbers.split(".")])
    left, right = zip(*zip_longest(*parts, fillvalue=0), strict=True)
    return bool(left < right)


def find_largest_rank(contents: Contents) -> int:
    """Return the largest rank of an adapter, in its factors or in its config; 0 without any."""
    configured = [contents.config.get("r"), *(contents.config.get("rank_pattern") or {}).values()]
    stated = [int(value) for value in configured if isinstance(value, int | float)]
    return max([*stated, *(item.rank or 0 for item in contents.items)], default=0)


def find_refusal(
    consumer: Consumer, rule: ConsumerRule, contents: Contents, max_lora_rank: int | None = None
) -> str:
    """Return the reason for which a consumer does not load an adapter; empty if it does."""
    if contents.form not in consumer.forms:
        return (
            f"it reads files of {' and '.join(sorted(consumer.forms))}, and this one is of "
            f"{contents.form}"
        )
    if contents.form == "peft" and not contents.config:
        return "adapter_config.json is missing or gives no lora_alpha; --fix writes one"
    rank = find_largest_rank(contents)
    limit = consumer.largest_rank
    if max_lora_rank is not None and consumer.rank_option:
        limit = max_lora_rank
    if limit is not None and rank > limit:
        return f"rank {rank} is above {consumer.rank_option} {limit}"
    return rule.refuses(contents)


def _divide_by_rank(alpha: float, rank: int, config: Mapping[str, Any]) -> float:
    """Return α/r or, with rsLoRA, α/√r."""
    return float(alpha / (math.sqrt(rank) if config.get("use_rslora") else rank))


def _explain_tie(form: str, contents: Contents) -> str:
    """Return why the program of a layout does not load an adapter of a BASE with a tied head; empty
    if it does.
    """
    for item in contents.items:
        if reason := why_not_tied(form, item):
            return f"{reason} ({item.layer})"
    return ""


def _explain_possible_tie(form: str, contents: Contents) -> str:
    """Return the problem of an adapter if its BASE, which is not given, has a tied head; empty
    without one.
    """
    if contents.tied is not None or not (reason := _explain_tie(form, contents)):
        return ""
    return f"the adapter is refused if {reason}: give BASE"


def join_reasons(*reasons: str) -> str:
    """Return the non-empty reasons, separated by semicolons; empty if there are none."""
    return "; ".join(filter(None, reasons))


# PEFT: s = α/r or α/√r, r and α of each module from ``rank_pattern`` and ``alpha_pattern``.
#
# Source: huggingface/peft, ``tuners/lora/model.py`` (``_create_and_replace``),
# ``tuners/lora/layer.py`` (``update_layer``), ``utils/other.py`` (``get_pattern_key``). A key k of
# a pattern is for module m if
#
# - 0.15 and later: ``re.match(rf"(.*\.)?({k})$", m)``, looked up separately for r and α (read in
#   0.15.0, 0.21.2);
# - 0.14: ``re.match(rf".*\.{k}$", m)``, so that a key that is the whole name or is anchored (``^``)
#   matches nothing (read in 0.14.0);
# - 0.13 and before: the same, and the first key of both tables together decides about r and α (read
#   in 0.13.2).
#
# Where r is not that of the file's factors, loading fails with a size mismatch. A config with a
# field that 0.13.2 does not know is a TypeError there; 0.14 ignores it with a warning, trained
# token rows among them (``config.py``; run with 0.13.2, 0.14.0 and 0.21.2).
# Date read: 2026-11-30.

# Fields of ``LoraConfig`` in 0.13.2.
_FIELDS_BEFORE_0_14 = {
    "alpha_pattern", "auto_mapping", "base_model_name_or_path", "bias", "fan_in_fan_out",
    "inference_mode", "init_lora_weights", "layer_replication", "layers_pattern",
    "layers_to_transform", "loftq_config", "lora_alpha", "lora_dropout", "megatron_config",
    "megatron_core", "modules_to_save", "peft_type", "r", "rank_pattern", "revision",
    "runtime_config", "target_modules", "task_type", "use_dora", "use_rslora",
}  # fmt: skip


def _apply_peft(contents: Contents, item: Item) -> Outcome:
    """Return the treatment of an item by PEFT since 0.15."""
    return Outcome("intended", item.scale) if item.part in {*PAIRS, "other"} else Outcome("full")


def _find_pattern_key(keys: Iterable[str], module: str) -> str:
    """Return the key of a pattern that PEFT before 0.15 uses for a module; the module's name
    without one.
    """
    return next((key for key in keys if re.match(rf".*\.{key}$", module)), module)


def _find_settings(contents: Contents, item: Item, together: bool) -> tuple[int, float]:
    """Return r and α of a module by the rule of PEFT before 0.15; ``together`` for that before
    0.14.
    """
    config = contents.config
    ranks: Mapping[str, int] = config.get("rank_pattern") or {}
    alphas: Mapping[str, float] = config.get("alpha_pattern") or {}
    rank_key = _find_pattern_key([*ranks, *alphas] if together else ranks, item.module)
    alpha_key = rank_key if together else _find_pattern_key(alphas, item.module)
    return ranks.get(rank_key, config["r"]), alphas.get(alpha_key, config["lora_alpha"])


def _refuse_peft_old(contents: Contents, together: bool) -> Iterator[str]:
    """Yield why PEFT before 0.15, or with ``together`` before 0.14, does not load an adapter."""
    if contents.config.get("peft_type") != "LORA":
        return
    unknown = sorted(contents.config.keys() - _FIELDS_BEFORE_0_14)
    if together and unknown:
        yield f"adapter_config.json has fields that it does not know: {', '.join(unknown[:3])}"
        return
    for item in contents.pairs:
        rank, _ = _find_settings(contents, item, together)
        if item.part != "experts" and rank != item.rank:
            problem = f"has rank {item.rank}, and its patterns give it {rank}: size mismatch"
            yield f"{item.module} {problem}"
            return


def _apply_peft_old(contents: Contents, item: Item, together: bool) -> Outcome:
    """Return the treatment of an item by PEFT 0.14, or with ``together`` (one key decides r and α)
    by earlier ones.
    """
    if item.part == "rows":
        return Outcome("dropped", why="trainable_token_indices is not read")
    if item.part not in {"factors", "embedding", "convolution"}:
        return _apply_peft(contents, item)
    rank, alpha = _find_settings(contents, item, together)
    scale = _divide_by_rank(alpha, rank, contents.config)
    return Outcome("applied", scale, "a pattern's key is matched otherwise than today")


PEFT = Consumer(
    "peft",
    "PEFT",
    frozenset({"peft"}),
    (
        ConsumerRule("0.15", "", ("0.15.0", "0.21.2"), _apply_peft),
        ConsumerRule(
            "0.14",
            "0.15",
            ("0.14.0",),
            partial(_apply_peft_old, together=False),
            partial(_refuse_peft_old, together=False),
        ),
        ConsumerRule(
            "",
            "0.14",
            ("0.13.2",),
            partial(_apply_peft_old, together=True),
            partial(_refuse_peft_old, together=True),
        ),
    ),
)


# vLLM: α/r or α/√r, since 0.32 with the patterns; refuses unsupported settings.
#
# Source: vllm-project/vllm, ``lora/peft_helper.py`` (``PEFTHelper``: ``get_rank_and_scaling``,
# ``_validate_features``, ``validate_legal``), ``lora/lora_model.py`` (``from_lora_tensors``,
# ``check_unexpected_modules``), ``lora/utils.py`` (``parse_fine_tuned_lora_name``),
# ``config/lora.py`` (``MaxLoRARanks``).
#
# - 0.32 and later: the scale of each module by PEFT's rule; ``lora_bias``, initialisations that
#   change the base, activated LoRA, ``layer_replication``, BD-LoRA and QA-LoRA are refused (read in
# 0.32.0, 0.33.0);
# - before: one scale for all modules, patterns are not read; these are not detected, and
#   ``lora_B.bias`` is overwritten by ``lora_B.weight``, which sorts after it (read in 0.28.0,
# 0.30.0, 0.31.0);
# - 0.10: any ``modules_to_save`` is refused, and so are stacked experts; ``lora_bias`` is applied
#   with ``--enable-lora-bias`` and dropped without (read in 0.10.0). When that changed between 0.10
# and 0.28 was not read.
#
# Whether a model of vLLM takes factors on a module is not known here, only that none takes them on
# a convolution. Of stacked experts the orientation is not known, either: they are ``unknown``. Date
# read: 2026-11-27.

_EXPERTS_UNJUDGED = (
    "whether it applies factors of stacked experts, and which way round, depends on its model class"
)

VLLM_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)

# Initialisations after which the base is the one that the adapter names.
_PLAIN_STARTS = {"gaussian", "eva", "orthogonal", "mica", "lora_ga"}
_UNSUPPORTED = {
    "lora_bias": "lora_bias",
    "alora_invocation_tokens": "activated LoRA",
    "layer_replication": "layer_replication",
    "use_bdlora": "BD-LoRA",
    "use_qalora": "QA-LoRA",
}


# Heads that it takes in full.
_SAVED_HEADS = ("classifier", "score")


def _refuse_vllm(contents: Contents, since: str) -> Iterator[str]:
    """Yield why the versions of vLLM from ``since`` do not load an adapter."""
    config = contents.config
    saved = config.get("modules_to_save") or []
    if not isinstance(saved, list):
        saved = [saved]
    if since != "0.10":
        saved = [name for name in saved if name not in _SAVED_HEADS]
    if saved:
        yield f"modules_to_save {', '.join(map(str, saved))}"
    if config.get("use_dora") or contents.first("dora"):
        yield "DoRA"
    if config.get("bias") not in (None, "none"):
        yield f"bias={config['bias']!r}"
    if since == "0.32":
        yield ", ".join(word for key, word in _UNSUPPORTED.items() if config.get(key))
        start = config.get("init_lora_weights")
        if isinstance(start, str) and start.lower() not in _PLAIN_STARTS:
            yield f"init_lora_weights={start!r}, which changes the base"
    odd = contents.first("convolution", "rows", "other")
    if odd is None and since == "0.10":
        odd = contents.first("experts")
    if odd is not None:
        yield f"{odd.key}: a tensor that it has no place for"
    value = contents.first("value", "norm")
    if value is not None and value.module.rpartition(".")[2] not in _SAVED_HEADS:
        yield f"{value.key}: a weight in full"


def _apply_vllm(contents: Contents, item: Item) -> Outcome:
    """Return the treatment of an item by vLLM since 0.32."""
    if item.part in {"value", "norm"}:
        return Outcome("full")
    return Outcome("applied", item.scale, unjudged=_explain_experts(item))


def _explain_experts(item: Item) -> str:
    """Return what is not known of factors of stacked experts; empty for another item."""
    return _EXPERTS_UNJUDGED if item.part == "experts" else ""


def _apply_vllm_old(contents: Contents, item: Item) -> Outcome:
    """Return the treatment of an item by vLLM before 0.32."""
    if item.part in {"value", "norm"}:
        return Outcome("full")
    if item.part == "bias":
        return Outcome("dropped", why="lora_B.bias is overwritten by lora_B.weight")
    scale = _divide_by_rank(contents.config["lora_alpha"], contents.config["r"], contents.config)
    why = "one scale for all modules; patterns are not read"
    return Outcome("applied", scale, why, _explain_experts(item))


VLLM = Consumer(
    "vllm",
    "vLLM",
    frozenset({"peft"}),
    (
        ConsumerRule(
            "0.32", "", ("0.32.0", "0.33.0"), _apply_vllm, partial(_refuse_vllm, since="0.32")
        ),
        ConsumerRule(
            "0.28",
            "0.32",
            ("0.28.0", "0.30.0", "0.31.0"),
            _apply_vllm_old,
            partial(_refuse_vllm, since="0.28"),
        ),
        ConsumerRule(
            "0.10", "0.28", ("0.10.0",), _apply_vllm_old, partial(_refuse_vllm, since="0.10")
        ),
    ),
    largest_rank=VLLM_RANKS[-1],
    default_rank=16,
    rank_option="--max-lora-rank",
    rank_choices=VLLM_RANKS,
)


# SGLang: α/r for all modules, regardless of patterns and rsLoRA; factors of another rank than r are
# an error.
#
# Source: sgl-project/sglang, ``srt/lora/lora.py`` (``LoRAAdapter.__init__``, ``_process_weight``,
# ``normalize_qkv_proj``, ``normalize_gate_up_proj``), ``lora_config.py``, ``lora_manager.py``
# (``validate_new_adapter``), ``mem_pool.py`` (``load_lora_weight_to_buffer``), ``utils.py``
# (``get_normalized_target_modules``, ``get_target_module_name``).
#
# - The scale is ``lora_alpha / r``; rsLoRA is not read (issue 40835, open in September 2026), nor
#   are patterns.
# - A buffer has r rows and takes a factor of r rows and no other: unequal ranks fail an assertion.
# - ``target_modules`` must be a list, or ``all`` or ``all-linear``: a regular expression is
#   refused.
# - q, k and v of a layer are joined: with one of them adapted, q and v must be (a missing k is
#   zero).
# - ``lm_head`` and embeddings that ``target_modules`` does not name are skipped, as is every weight
#   outside the layers; ``lora_B.bias`` is overwritten by ``lora_B.weight``, which sorts after it.
# - DoRA is refused: in 0.5.23 by name, before by the shape of its magnitudes.
#
# Read in 0.5.10 and 0.5.23. A later ``lora_config.py`` (commit 0ceb81fe) keeps entries of patterns
# that differ from the defaults, to decide about them when an adapter is loaded: not judged here.
# Date read: 2026-11-27.

_LAYER = re.compile(r"(?:^|\.)layers\.(\d+)\.")
_JOINED = ("q_proj", "k_proj", "v_proj")
_TABLES = ("embed_tokens", "lm_head")


def _refuse_sglang(contents: Contents) -> Iterator[str]:
    """Yield why SGLang does not load an adapter."""
    config = contents.config
    kind = str(config.get("peft_type"))
    if kind.lower() != "lora":
        yield f"peft_type {kind}"
    if config.get("use_dora") or contents.first("dora"):
        yield "DoRA"
    targets = config.get("target_modules")
    if isinstance(targets, str) and targets not in {"all", "all-linear"}:
        yield "target_modules as a regular expression"
    elif not targets:
        yield "no target_modules"
    odd = contents.first(
        "other", "convolution", "experts", "residual" if config.get("kasa_config") else "other"
    )
    if odd is not None:
        yield f"{odd.key}: no target module of the server has such a name"
    rank = config.get("r")
    for item in contents.pairs:
        if item.rank != rank and item.part != "experts":
            yield f"{item.module} has rank {item.rank}, and r is {rank}: an assertion fails"
            break
    yield next(_list_incomplete(contents), "")


def _list_incomplete(contents: Contents) -> Iterator[str]:
    """Yield a sentence for each attention with factors for some of q, k and v but not for both q
    and v.
    """
    owners: dict[str, set[str]] = {}
    for item in contents.pairs:
        owner, _, leaf = item.module.rpartition(".")
        if leaf in _JOINED and _LAYER.search(item.module):
            owners.setdefault(owner, set()).add(leaf)
    for owner, leaves in owners.items():
        if missing := [leaf for leaf in ("q_proj", "v_proj") if leaf not in leaves]:
            yield (
                f"{owner} has factors for {', '.join(sorted(leaves))} and none for "
                f"{', '.join(missing)}"
            )


def _apply_sglang(contents: Contents, item: Item) -> Outcome:
    """Return the treatment of an item by SGLang."""
    if item.part == "bias":
        why = "lora_B.bias is overwritten by lora_B.weight, other biases are skipped"
        return Outcome("dropped", why=why)
    if item.part in {"value", "norm", "rows"}:
        return Outcome("dropped", why="what is no pair of factors is skipped")
    if not _LAYER.search(item.module + "."):
        table = next((name for name in _TABLES if name in item.module), None)
        names = contents.config.get("target_modules") or ()
        if isinstance(names, str):
            names = ["all"]
        targets = {str(name).rpartition(".")[2] for name in names}
        if table is None or not targets & {table, "all"}:
            return Outcome("dropped", why="outside the layers, and not named in target_modules")
    scale = float(contents.config["lora_alpha"] / contents.config["r"])
    why = "lora_alpha / r for all modules; rsLoRA and patterns are not read"
    return Outcome("applied", scale, why)


SGLANG = Consumer(
    "sglang",
    "SGLang",
    frozenset({"peft"}),
    (ConsumerRule("0.5.10", "", ("0.5.10", "0.5.23"), _apply_sglang, _refuse_sglang),),
    rank_option="--max-lora-rank",
)


# llama.cpp: one α for all, divided by the rank of each tensor; the converter stops at every other
# kind of tensor.
#
# Source: ggml-org/llama.cpp, ``convert_lora_to_gguf.py`` (``get_tensors``;
# ``alpha = lparams["lora_alpha"]``) at commit 0b03adaa632b, and ``src/llama-adapter.h``
# (``llama_adapter_lora_weight::get_scale``: ``alpha ? alpha / rank : 1``, rank from ``lora_b``) at
# commit 215841fc0178.
#
# - ``alpha_pattern``, ``rank_pattern`` and ``use_rslora`` are not read.
# - ``.base_layer.weight`` is skipped, weights of norms are passed through; any other name that is
#   no ``lora_A``/``lora_B`` weight or ``lora_embedding_A``/``B`` ends the conversion. The runtime
# skips norms
#   (``src/llama-adapter.cpp``, ``llama_adapter_lora_init_impl``, at commit fdfa89f12e75).
# - With a head tied to the embedding, an update of the head has no tensor and is refused, and one
#   of the embedding ends the process: it reaches the head, where its shapes do not fit (run with
# the build b11739).
# - A module that the architecture's table of names does not have ends it, too; this check covers
#   stacked experts only.
#
# Date read: 2026-11-27.


def _refuse_llamacpp(contents: Contents) -> Iterator[str]:
    """Yield why llama.cpp's converter or runtime does not take an adapter."""
    odd = contents.first("dora", "bias", "value", "rows", "other")
    if odd is not None:
        yield f"the converter stops at {odd.key}"
    if contents.config.get("use_bdlora"):
        yield "BD-LoRA"
    if contents.config.get("kasa_config"):
        yield "KaSA"
    stack = contents.first("experts", "convolution")
    if stack is not None:
        yield f"the converter has no name for {stack.module}"
    if contents.tied:
        yield _explain_tie(GGUF, contents)


def _apply_llamacpp(contents: Contents, item: Item) -> Outcome:
    """Return the treatment of an item by llama.cpp."""
    if item.part == "norm":
        return Outcome("dropped", why="the runtime skips norms")
    if contents.form == GGUF:
        return Outcome("intended", item.scale)
    alpha = float(contents.config["lora_alpha"])
    assert item.rank is not None
    why = "lora_alpha / rank of the tensor; patterns and rsLoRA are not read"
    return Outcome("applied", alpha / item.rank if alpha else 1.0, why)


LLAMACPP = Consumer(
    "llamacpp",
    "llama.cpp",
    frozenset({"peft", GGUF}),
    (
        ConsumerRule(
            "",
            "",
            ("0b03adaa632b",),
            _apply_llamacpp,
            _refuse_llamacpp,
            partial(_explain_possible_tie, GGUF),
        ),
    ),
)


# diffusers: a ``LoraConfig`` made from the file's ranks and alphas, or from its metadata.
#
# Source: huggingface/diffusers, ``utils/peft_utils.py`` (``get_peft_kwargs``), ``loaders/peft.py``
# (``load_lora_adapter``), ``loaders/lora_conversion_utils.py``. Each part of the pipeline (U-Net,
# transformer, text encoder) has its own config:
#
# - r is the most frequent rank, ``rank_pattern`` names the others.
# - With alphas in the file: α is the most frequent of them (or the only one), ``alpha_pattern``
#   names the others, and a module without one gets that α.
# - Without any: α = r in every module since 0.40 (pull request 14409; read in 0.40.0, 0.42.1);
#   before, the rank of the first module in the file is the α of all (read in 0.36.0, 0.39.0).
# - ``lora_adapter_metadata`` in the file takes the place of all this.
# - In a kohya file of a U-Net, ``_convert_unet_lora_key`` renames attention projections to
#   ``…processor.to_q_lora``, which ``_get_alpha_name`` does not expect: their own α are found under
# no module, and each gets the most frequent
#   one. So does attention of text encoders and, with transformers 5, whose ``CLIPTextModel`` has no
# ``text_model``,
#   the MLP of the first; not that of the second (``CLIPTextModelWithProjection``).
# - ``dora_scale`` is deleted with a warning before anything is loaded, in every pipeline
#   (``lora_pipeline.py``): B·A alone is added. ``lora_magnitude_vector`` in a diffusers file is
# loaded.
# - In a diffusers file without a transformer, a name without "lora" (``.alpha``) is a ValueError.
# - So is a text encoder of which no name is recognized: in kohya files ``out_proj`` and the MLP
#   are, in those of diffusers attention projections and ``lora_linear_layer``
# (``utils/state_dict_utils.py``). Where the MLP alone is,
#   the query, key and value of the old names and of kohya are dropped with a warning, as without
# ``to_out_lora``.
# - With transformers 5, CLIP has no ``text_model``, and whole names in patterns of older metadata
#   match nothing. Not judged here.
#
# All from ``_convert_unet_lora_key`` on was found by running 0.42.1 (``benchmarks.servers``); all
# but the last was read in all four versions. Date read: 2026-11-30.

_TEXT_ENCODER = re.compile(r"lora_te[12]?|text_encoder(_2)?")
_RECOGNIZED = re.compile(
    r"attn_out_proj\.|mlp_fc\d\.|_proj\.lora_[AB]\.|lora_linear_layer\.|to_out_lora\."
)
_OLD_PROJECTION = re.compile(r"_attn_[qkv]_proj\.|\.to_[qkv]_lora\.")
_OLD_OUTPUT = re.compile(r"_attn_out_proj\.|\.to_out_lora\.")
_UNET_BLOCK = re.compile(
    r"lora_unet_(?:down_blocks|mid_block|up_blocks|input_blocks|middle_block|output_blocks)_"
)
_WITHOUT_OWN_ALPHA = re.compile(
    r"lora_te1?_|lora_te2_.*_self_attn_|lora_unet_.*_to_(?:q|k|v|out_0)$"
)


def _refuse_diffusers(contents: Contents) -> Iterator[str]:
    """Yield why diffusers does not load an adapter."""
    odd = contents.first("other")
    if odd is not None:
        yield f"{odd.key}: a part that is no LoRA"
    if contents.form != "kohya" and "transformer" not in contents.components:
        with_alpha = (item for item in contents.pairs if item.alpha is not None)
        if (item := next(with_alpha, None)) is not None:
            yield f"{item.module} has a tensor of its alpha"
    for name, items in contents.components.items():
        is_recognized = any(_RECOGNIZED.search(item.key) for item in items)
        if _TEXT_ENCODER.fullmatch(name) and not is_recognized:
            yield f"{name}: names of no layout that is recognized"
            break


def _is_of_unet(contents: Contents) -> bool:
    """Return whether a file is kohya's, of a U-Net or its text encoders."""
    modules = [item.module for item in contents.pairs if item.module.startswith("lora_unet_")]
    return contents.form == "kohya" and (not modules or any(map(_UNET_BLOCK.match, modules)))


def _apply_diffusers(contents: Contents, item: Item, alpha_is_rank: bool) -> Outcome:
    """Return the treatment of an item by diffusers; ``alpha_is_rank``: without any α, α = r in
    every module.
    """
    if item.rank is None:
        return Outcome("full")
    component = parse_component(item.module)
    items = sorted(contents.components[component], key=lambda other: other.key)
    is_old = _TEXT_ENCODER.fullmatch(component) and _OLD_PROJECTION.search(item.key)
    if is_old and not any(_OLD_OUTPUT.search(other.key) for other in items):
        why = "its name is recognized only with factors of out_proj in the text encoder"
        return Outcome("dropped", why=why)
    if item.part == "dora" and contents.form != "kohya":
        return Outcome("intended", item.scale)
    if contents.has_metadata and item.alpha is None:
        return Outcome("intended", item.scale)
    is_found = not (_WITHOUT_OWN_ALPHA.match(item.module) and _is_of_unet(contents))
    if item.alpha is not None and is_found:
        return Outcome("applied", item.alpha / item.rank)
    alphas = [other.alpha for other in items if other.alpha is not None]
    if not alphas and alpha_is_rank:
        return Outcome("applied", 1.0)
    alpha = Counter(alphas).most_common(1)[0][0] if alphas else float(items[0].rank or 1)
    problem = "gives no alpha" if item.alpha is None else "its alpha is not found by name"
    why = f"{problem}, and it gets {alpha:g}, that of other modules"
    return Outcome("applied", alpha / item.rank, why)


DIFFUSERS = Consumer(
    "diffusers",
    "diffusers",
    frozenset({"diffusers", "kohya"}),
    (
        ConsumerRule(
            "0.40",
            "",
            ("0.40.0", "0.42.1"),
            partial(_apply_diffusers, alpha_is_rank=True),
            _refuse_diffusers,
        ),
        ConsumerRule(
            "",
            "0.40",
            ("0.36.0", "0.39.0"),
            partial(_apply_diffusers, alpha_is_rank=False),
            _refuse_diffusers,
        ),
    ),
)


# kohya's sd-scripts: α/r of each module, α from the file; a missing α, or one of 0, means r.
#
# Source: kohya-ss/sd-scripts, ``networks/lora.py`` (``LoRAModule.__init__``,
# ``create_network_from_weights``, ``load_weights``) at commit 02298e3c4a7e. The rank is that of
# ``lora_down``. Weights are loaded without ``strict``, so that tensors other than factors and α are
# ignored: the magnitudes of DoRA and the parts of LyCORIS. Date read: 2026-11-27.


def _apply_kohya(contents: Contents, item: Item) -> Outcome:
    """Return the treatment of an item by sd-scripts."""
    if item.rank is None or item.part == "other":
        return Outcome("dropped", why="only pairs of factors are read; other parts need LyCORIS")
    return Outcome("applied", item.alpha / item.rank if item.alpha else 1.0)


KOHYA = Consumer(
    "kohya",
    "sd-scripts",
    frozenset({"kohya"}),
    (ConsumerRule("", "", ("02298e3c4a7e",), _apply_kohya),),
)


# mlx-lm: ``lora_parameters.scale`` for all modules, not divided by the rank; one rank for all.
#
# Source: ml-explore/mlx-lm, ``tuner/utils.py`` (``load_adapters``, ``linear_to_lora_layers``),
# ``tuner/lora.py``, ``tuner/dora.py`` of mlx-lm 0.32.2. The model's layers are made with ``rank``,
# ``scale`` and ``dropout`` of the config for the last ``num_layers`` blocks, so that a config
# without one of them, a factor of another rank and a tensor that is none of ``lora_a``, ``lora_b``
# and ``m`` are errors. So are factors of a module that got no such layer: of a block before the
# last ``num_layers``, of one that ``keys`` does not name (by its path, or by its name in a block),
# and of a head that is tied to the embedding. How many blocks BASE has is not looked up: they are
# counted to the last one in the file. The update of the embedding acts in a tied head, too
# (``LoRAEmbedding.as_linear``). Date read: 2026-11-30.

_IN_BLOCK = re.compile(r"(?:^|\.)layers\.(\d+)\.(.+)")


def _explain_unplaced(contents: Contents) -> str:
    """Return the problem of the first module with factors for which mlx-lm makes no layer; empty
    without one.
    """
    keys = contents.config["lora_parameters"].get("keys")
    count = contents.config["num_layers"]
    places = {item.module: _IN_BLOCK.search(item.module) for item in contents.pairs}
    last = max((int(place[1]) for place in places.values() if place), default=0)
    for module, place in places.items():
        if isinstance(keys, list) and module in keys:
            continue
        if place is None or (isinstance(keys, list) and place[2] not in keys):
            return f"{module} is not in lora_parameters.keys"
        if isinstance(count, int) and 0 < count <= last - int(place[1]):
            return f"{module} is not in the last {count} blocks (num_layers)"
    return ""


def _refuse_mlx(contents: Contents) -> Iterator[str]:
    """Yield why mlx-lm does not load an adapter."""
    config = contents.config
    if config.get("fine_tune_type") == "full":
        return
    settings = config.get("lora_parameters") or {}
    missing = [key for key in ("rank", "scale", "dropout") if key not in settings]
    if "num_layers" not in config:
        missing.append("num_layers")
    if missing:
        yield f"the config gives no {', '.join(missing)}"
    for item in contents.pairs:
        if "rank" in settings and item.rank != settings["rank"]:
            problem = f"has rank {item.rank}, and lora_parameters.rank is {settings['rank']}"
            yield f"{item.module} {problem}"
            break
    odd = next((item for item in contents.items if item.part not in PAIRS), None)
    if odd is not None:
        yield f"{odd.key}: no adapter parameter"
    if not missing:
        yield _explain_unplaced(contents)
    if contents.tied:
        yield _explain_tie("mlx", contents)


def _apply_mlx(contents: Contents, item: Item) -> Outcome:
    """Return the treatment of an item by mlx-lm."""
    return Outcome("intended", item.scale) if item.part in PAIRS else Outcome("full")


MLX = Consumer(
    "mlx",
    "mlx-lm",
    frozenset({"mlx"}),
    (
        ConsumerRule(
            "0.32", "", ("0.32.2",), _apply_mlx, _refuse_mlx, partial(_explain_possible_tie, "mlx")
        ),
    ),
)

# In the order of tables.
CONSUMERS = {
    consumer.name: consumer for consumer in (PEFT, VLLM, SGLANG, LLAMACPP, DIFFUSERS, KOHYA, MLX)
}
