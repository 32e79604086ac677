"""Adapter configurations of a search, in PEFT's form. Trains nothing."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

# As ``probe sweep`` trains: lora_alpha / r, or with rsLoRA lora_alpha.
ALPHA_OVER_RANK, RSLORA_ALPHA = 2, 16
DROPOUT, WEIGHT_DECAY = 0.1, 0.1


@dataclass(frozen=True, slots=True)
class Variant:
    """One configuration.

    Args:
        name: Identifies its runs.
        config: Content of ``adapter_config.json``.
        lr: Peak learning rate.
        steps: Updates.
        decay: Weight decay of AdamW.
        vectors: Whether BASE's biases and norms are trained, too.
    """

    name: str
    config: Mapping[str, Any]
    lr: float
    steps: int
    decay: float = 0.0
    vectors: bool = False

    @property
    def dropout(self) -> float:
        """lora_dropout."""
        return float(self.config["lora_dropout"])

    @property
    def alpha_over_rank(self) -> float:
        """lora_alpha / r."""
        return float(self.config["lora_alpha"]) / int(self.config["r"])


def find_shortest_names(chosen: Sequence[str], every: Collection[str]) -> list[str]:
    """Return the shortest names by which PEFT finds these modules and no other.

    Args:
        chosen: Paths of the modules to adapt.
        every: Paths of all modules.

    Example:
        >>> find_shortest_names(["a.0.q", "a.1.q", "a.0.v"], ["a.0.q", "a.1.q", "a.0.v", "a.1.v"])
        ['a.0.v', 'q']
    """
    names: set[str] = set()
    for path in chosen:
        leaf = path.rpartition(".")[2]
        reached = {candidate for candidate in every if candidate == leaf or candidate.endswith(f".{leaf}")}
        names.add(leaf if reached <= set(chosen) else path)
    return sorted(names)


def uniform(
    targets: Sequence[str], rank: int, transposed: bool, task: str | None, rslora: bool = False, dora: bool = False
) -> dict[str, Any]:
    """Return the configuration of one rank everywhere, its keys in the order of ``allocate``'s.

    Args:
        targets: Modules as PEFT finds them.
        rank: r.
        transposed: Whether matrices are stored ``(in, out)``.
        task: PEFT's task type.
        rslora: Whether PEFT scales by lora_alpha/√r.
        dora: Whether it is DoRA.
    """
    return {
        "peft_type": "LORA",
        "task_type": task,
        "base_model_name_or_path": None,
        "r": rank,
        "lora_alpha": RSLORA_ALPHA if rslora else ALPHA_OVER_RANK * rank,
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


def ranks_of(config: Mapping[str, Any], paths: Iterable[str]) -> dict[str, int]:
    """Return the rank of each module as PEFT reads a configuration: 0 where it is no target.

    Args:
        config: Content of ``adapter_config.json``.
        paths: Paths of the modules.

    Example:
        >>> config = {"target_modules": ["q", "0.v"], "rank_pattern": {"1.q": 8}, "r": 4}
        >>> ranks_of(config, ["a.0.q", "a.1.q", "a.0.v", "a.1.v"])
        {'a.0.q': 4, 'a.1.q': 8, 'a.0.v': 4, 'a.1.v': 0}
    """
    ranks = {}
    for path in paths:
        matching_ranks = (rank for key, rank in config["rank_pattern"].items() if re.match(rf"(.*\.)?({key})$", path))
        is_target = any(path == name or path.endswith(f".{name}") for name in config["target_modules"])
        ranks[path] = next(matching_ranks, config["r"]) if is_target else 0
    return ranks


def least_rank(rank: int) -> int:
    """Return the least rank of a layer where ranks differ: 1, so that every layer is trained; 0 where the mean is 1."""
    return min(1, rank - 1)


def change_variant(variant: Variant, trial: str) -> Variant:
    """Return a configuration with one change for stability.

    Args:
        variant: The incumbent.
        trial: ``dropout``, ``weight-decay``, ``half-alpha`` or ``fewer-steps``.

    Example:
        >>> one = Variant("uniform-r4", uniform(["q"], 4, False, None), 1e-3, 100)
        >>> change_variant(one, "half-alpha").config["lora_alpha"], change_variant(one, "fewer-steps").steps
        (4.0, 50)
    """
    name = f"{variant.name}+{trial}"
    if trial == "dropout":
        return replace(variant, name=name, config={**variant.config, "lora_dropout": DROPOUT})
    if trial == "weight-decay":
        return replace(variant, name=name, decay=WEIGHT_DECAY)
    if trial == "half-alpha":
        alphas = {key: alpha / 2 for key, alpha in variant.config["alpha_pattern"].items()}
        config = {**variant.config, "lora_alpha": variant.config["lora_alpha"] / 2, "alpha_pattern": alphas}
        return replace(variant, name=name, config=config)
    if trial == "fewer-steps":
        return replace(variant, name=name, steps=max(1, variant.steps // 2))
    raise ValueError(trial)
