r"""An allocation as a PEFT ``LoraConfig``: the file ``adapter_config.json`` that training starts
from.

It implements PEFT's matching of names. ``target_modules`` and ``target_parameters``: an entry
matches every module with this name or ending in ``.`` and this name. ``rank_pattern`` and
``alpha_pattern``: a key k matches module m iff ``re.match(rf"(.*\.)?({k})$", m)``, and the first
key wins (``peft.utils.other.get_pattern_key``); a key that matches nothing is ignored. Every name
is therefore resolved by these rules against all names of the run before it is written. Whether
names on disk equal those in memory can only be checked by building the model.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from lora_diag.decisions.allocate.measure import head_of, task_type_of
from lora_diag.decisions.allocate.record import Allocation
from lora_diag.errors import Given, InputError, UsageError
from lora_diag.records import Results

# Wrappers of a model that may be absent from its names; removed if the remaining name is
# unambiguous.
_WRAPPERS = re.compile(r"^(?:(?:base_model|module|model|transformer)\.)+")
_STACKED = re.compile(r"(.+)\[\d+\]")
# Experts that BASE stores one by one; transformers 5 fuses them into two parameters on loading.
_EXPERT = re.compile(r"\.experts\.\d+\.")
# Projections of GPT-2 with more outputs than inputs; fewer stored rows than columns indicate its
# Conv1D.
_WIDENING = re.compile(r"\.(c_attn|c_fc)(\.weight)?$")


@dataclass(frozen=True)
class PeftScaling:
    """PEFT's multiplier of B·A.

    Args:
        factor: lora_alpha / r of every layer; or, with rsLoRA, lora_alpha / √r of the layers with
            the usual rank.
        rslora: Whether lora_alpha is one number for all layers, and the scaling lora_alpha / √r.
    """

    factor: float = 2.0
    rslora: bool = False

    def __post_init__(self) -> None:
        """Check that the factor is positive and finite.

        Raises:
            UsageError: The factor is not above 0 and finite.
        """
        if not 0 < self.factor < math.inf:
            raise UsageError(Given("scaling", self.factor), "must be a number above 0")

    def alpha(self, rank: int, default_rank: int) -> float:
        """Return lora_alpha for a layer, where most layers have rank ``default_rank``.

        >>> PeftScaling(2.0).alpha(16, 8), PeftScaling(2.0, rslora=True).alpha(16, 4)
        (32.0, 4.0)
        """
        return self.factor * (math.sqrt(default_rank) if self.rslora else rank)


def make_config(
    targets: Sequence[str],
    rank: int,
    alpha: float,
    transposed: bool = False,
    task: str | None = None,
    rslora: bool = False,
    dora: bool = False,
) -> dict[str, Any]:
    """Return the content of ``adapter_config.json`` for one rank everywhere.

    Args:
        targets: Modules as PEFT finds them.
        rank: r.
        alpha: lora_alpha.
        transposed: Whether matrices are stored ``(in, out)``.
        task: PEFT's task type; None without one.
        rslora: Whether PEFT scales by lora_alpha/√r.
        dora: Whether it is DoRA.
    """
    return {
        "peft_type": "LORA",
        "task_type": task,
        "base_model_name_or_path": None,
        "r": rank,
        "lora_alpha": alpha,
        "rank_pattern": {},
        "alpha_pattern": {},
        "target_modules": list(targets),
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": transposed,
        "use_rslora": rslora,
        "init_lora_weights": True,
        "inference_mode": False,
        **({"use_dora": True} if dora else {}),
    }


def make_peft_config(
    results: Results[Allocation], scaling: PeftScaling = PeftScaling()
) -> dict[str, Any]:
    """Return the config of an adapter with these ranks.

    Args:
        results: An allocation.
        scaling: PEFT's multiplier of B·A.

    Returns:
        The content of ``adapter_config.json``: ``r`` is the most common rank, the others are in
            ``rank_pattern``.

    Raises:
        InputError: No layer has a rank, PEFT cannot adapt a layer with one, or a name cannot be
            expressed unambiguously for PEFT.
    """
    modules, parameters = _group_ranks(results)
    ranks = modules | parameters
    if not ranks:
        raise InputError("every layer has rank 0, so there is no adapter to configure")
    default_rank = _find_most_common_rank(ranks.values())
    patterns = _make_patterns(ranks, default_rank)
    alphas = {key: scaling.alpha(rank, default_rank) for key, rank in patterns.items()}
    names = [record.layer for record in results] + [item.layer for item in results.left_out]
    model_paths = {module_of(name) for name in names}
    # With the parents of every path: a target ``0`` also matches ``blocks.0``.
    model_paths |= {path[: dot.start()] for path in model_paths for dot in re.finditer(r"\.", path)}
    # Whether the results name every tensor of BASE, so that a short name is known to be unique.
    # Results of an adapter do not: layers without an update have no record.
    tensors = next((side.tensors for side in results.run.inputs if side.role == "base"), math.inf)
    complete = len({re.sub(r"\[\d+\]$", "", name) for name in names}) >= tensors
    heads = {
        head_of(item.layer) or item.layer for item in results.left_out if item.reason == "saved"
    }
    config = make_config(
        _find_suffixes(modules, model_paths, complete),
        default_rank,
        _to_plain_number(scaling.alpha(default_rank, default_rank)),
        any(_WIDENING.search(layer.layer) and layer.shape[0] < layer.shape[1] for layer in results),
        task_type_of(results, heads),
        scaling.rslora,
    )
    config["rank_pattern"] = patterns
    if not scaling.rslora:
        config["alpha_pattern"] = {key: _to_plain_number(alpha) for key, alpha in alphas.items()}
    if heads:
        config["modules_to_save"] = _find_head_suffixes(heads, model_paths)
    if parameters:
        config["target_parameters"] = _find_suffixes(parameters, model_paths, complete)
    check_config(config, modules, parameters, model_paths)
    return config


def check_config(
    config: Mapping[str, Any],
    modules: Mapping[str, int],
    parameters: Mapping[str, int],
    model_paths: set[str],
) -> None:
    """Check that PEFT's rules give every name of a config the intended layers of a model, and every
    layer its rank.

    Args:
        config: Content of ``adapter_config.json``.
        modules: Rank by module to adapt.
        parameters: Rank by parameter other than ``weight`` to adapt, such as a stack of experts.
        model_paths: Paths of the modules and parameters of the model, as far as known.

    Raises:
        InputError: A name or key matches no layer, a name matches a wrong one, or a layer gets
            another rank.
    """
    for option, ranks in (("target_modules", modules), ("target_parameters", parameters)):
        entries = config.get(option) or []
        matching = {
            name: [path for path in model_paths if _ends_in(path, name)] for name in entries
        }
        if unmatched := [name for name, paths in matching.items() if not paths]:
            raise InputError(f"adapter_config.json: {option} {unmatched[0]!r} matches no layer")
        reached = {path for paths in matching.values() for path in paths}
        if differing := reached ^ set(ranks):
            raise InputError(
                f"adapter_config.json: {option} cannot tell {min(differing)} from other layers"
            )
    targets = {**modules, **parameters}
    matches = _find_matching_keys(config["rank_pattern"], targets)
    if unmatched_keys := set(config["rank_pattern"]) - {
        key for keys in matches.values() for key in keys
    }:
        raise InputError(
            f"adapter_config.json: rank_pattern {min(unmatched_keys)!r} matches no layer"
        )
    for path, rank in targets.items():
        key_ranks = {config["rank_pattern"][key] for key in matches[path]} or {config["r"]}
        if key_ranks != {rank}:
            raise InputError(
                f"adapter_config.json: rank_pattern gives {path} rank {sorted(key_ranks)}, not "
                f"{rank}"
            )


def compare_with_peft(
    results: Results[Allocation], configured: Mapping[str, tuple[int, float]], scaling: PeftScaling
) -> None:
    """Refuse a difference between an allocation and the ranks and scalings of the model that PEFT
    built.

    Args:
        results: The allocation.
        configured: Rank and scaling by module or parameter of the model in memory.
        scaling: The requested scaling.

    Raises:
        InputError: A layer has another rank or scaling, is missing, cannot be adapted by PEFT, or
            is adapted unexpectedly.
    """
    modules, parameters = _group_ranks(results)
    expected = modules | parameters
    default_rank = _find_most_common_rank(expected.values())
    remaining = dict(configured)
    for path, rank in expected.items():
        module = path.removesuffix(".weight")  # PEFT lists a parameter under its module
        candidates = [name for name in remaining if _ends_in(name, _WRAPPERS.sub("", module))]
        name = next(
            (name for name in candidates if name == module),
            candidates[0] if len(candidates) == 1 else None,
        )
        if name is None:
            raise InputError(
                Given("check"),
                f"the model has no module {path} that PEFT could adapt",
                "check that it is the model of the allocation",
            )
        rank_found, scaling_found = remaining.pop(name)
        factor = scaling.alpha(rank, default_rank) / (math.sqrt(rank) if scaling.rslora else rank)
        if rank_found != rank or not math.isclose(scaling_found, factor):
            raise InputError(
                Given("check"),
                f"PEFT gives {name} rank {rank_found}, scaling {scaling_found:g} "
                f"instead of {rank}, {factor:g}",
            )
    if remaining:
        raise InputError(Given("check"), f"PEFT also adapts {min(remaining)}, which has no rank")


def module_of(layer: str) -> str:
    """Return the path of the module or parameter that holds a weight, as transformers names it in
    memory.

    >>> (
    ...     module_of("model.layers.0.self_attn.q_proj.weight"),
    ...     module_of("model.layers.0.mlp.experts.down_proj[3]"),
    ... )
    ('model.layers.0.self_attn.q_proj', 'model.layers.0.mlp.experts.down_proj')
    >>> module_of(
    ...     "language_model.model.layers.0.mlp.up_proj.weight"
    ... )  # as vision-language models store it
    'language_model.layers.0.mlp.up_proj'
    """
    stacked = _STACKED.fullmatch(layer)
    path = stacked[1] if stacked else layer.removesuffix(".weight")
    return path.replace("language_model.model.", "language_model.").replace(
        "language_model.lm_head", "lm_head"
    )


def _group_ranks(results: Results[Allocation]) -> tuple[dict[str, int], dict[str, int]]:
    """Return ranks above 0 by module, and by parameter other than ``weight``: stacks of experts,
    ``in_proj_weight``.

    Raises:
        InputError: PEFT cannot adapt a layer with a rank, or two layers share a module name.
    """
    ranked = [record for record in results if record.rank]
    if experts := [record.layer for record in ranked if _EXPERT.search(record.layer)]:
        raise InputError(
            experts[0],
            f"PEFT cannot give ranks to it and to {len(experts) - 1} other experts that BASE "
            "stores one by one, because transformers 5 fuses them on loading",
            "exclude them with $exclude experts, measure a model that transformers 5 saved fused, "
            "or write the allocation as .jsonl",
        )
    modules = {
        module_of(record.layer): record.rank
        for record in ranked
        if record.layer.endswith(".weight")
    }
    parameters = {
        module_of(record.layer): record.rank
        for record in ranked
        if not record.layer.endswith(".weight")
    }
    if len(modules) + len(parameters) != len({record.group or record.layer for record in ranked}):
        raise InputError("PEFT", "two layers have the same module name", "select one with $layers")
    return modules, parameters


def _find_suffixes(targets: Mapping[str, int], model_paths: set[str], complete: bool) -> list[str]:
    """Return names that match these targets and no other path.

    The last part of the targets' paths if no other path ends in it and all paths are known; else
    each path, without its wrappers where unambiguous.

    Args:
        targets: Rank by path to adapt; only the paths are used.
        model_paths: Paths of the modules and parameters of the model.
        complete: Whether these are all of them.
    """
    names = []
    for leaf in sorted({_last_part(path) for path in targets}):
        reached = {path for path in model_paths if _ends_in(path, leaf)}
        if complete and reached <= set(targets):
            names.append(leaf)
        else:
            names += [
                _drop_wrappers(path, model_paths) for path in targets if _last_part(path) == leaf
            ]
    return names


def _find_head_suffixes(heads: set[str], model_paths: set[str]) -> list[str]:
    """Return the last part of each head's path if no other path ends in it, not necessarily at a
    dot; else the path.
    """
    names = set()
    for head in heads:
        leaf = _last_part(head)
        names.add(
            leaf if all(path in heads for path in model_paths if path.endswith(leaf)) else head
        )
    return sorted(names)


def _last_part(path: str) -> str:
    """Return the last part of a path, or the last two for a parameter named ``weight``."""
    return ".".join(path.split(".")[-2 if path.endswith(".weight") else -1 :])


def _make_patterns(ranks: Mapping[str, int], default_rank: int) -> dict[str, int]:
    """Return ranks by pattern key for paths with another rank than the default: one key per last
    part if all agree.
    """
    patterns: dict[str, int] = {}
    by_leaf: dict[str, dict[str, int]] = {}
    for path, rank in ranks.items():
        by_leaf.setdefault(path.rpartition(".")[2], {})[path] = rank
    for leaf, members in by_leaf.items():
        leaf_ranks = set(members.values())
        if len(leaf_ranks) == 1 and len(members) > 1 and default_rank not in leaf_ranks:
            patterns[_escape_name(leaf)] = leaf_ranks.pop()
        else:
            patterns |= {
                _escape_name(_drop_wrappers(path, set(ranks))): rank
                for path, rank in members.items()
                if rank != default_rank
            }
    return patterns


def _drop_wrappers(path: str, paths: Iterable[str]) -> str:
    """Return a path without its wrappers if no other path ends in the rest, else unchanged."""
    short = _WRAPPERS.sub("", path)
    return path if any(other != path and _ends_in(other, short) for other in paths) else short


def _escape_name(name: str) -> str:
    """Return a name as a regular expression; by convention dots stay, and ``check_config`` verifies
    the match.
    """
    return re.escape(name).replace(r"\.", ".").replace(r"\-", "-")


def _ends_in(path: str, name: str) -> bool:
    """Return whether a path is this name or ends in a dot and this name, as PEFT matches
    ``target_modules``.
    """
    return path == name or path.endswith(f".{name}")


def _find_matching_keys(keys: Iterable[str], paths: Iterable[str]) -> dict[str, list[str]]:
    """Return the keys that match each path; only a key whose last part ends the path can match, so
    few are tried.
    """
    by_leaf: dict[str, list[tuple[str, re.Pattern[str]]]] = {}
    for key in keys:
        by_leaf.setdefault(key.rpartition(".")[2], []).append(
            (key, re.compile(rf"(.*\.)?({key})$"))
        )
    return {
        path: [
            key
            for leaf, group in by_leaf.items()
            if path.endswith(leaf.replace("\\", ""))
            for key, pattern in group
            if pattern.match(path)
        ]
        for path in paths
    }


def _find_most_common_rank(ranks: Iterable[int]) -> int:
    """Return the most common rank; the smallest of equally common ones."""
    counts = Counter(ranks)
    return min(counts, key=lambda rank: (-counts[rank], rank))


def _to_plain_number(value: float) -> float | int:
    """Return a number, as an integer if it is whole."""
    return int(value) if value == int(value) else value
