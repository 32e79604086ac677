"""The files at an adapter's path: weights, settings, metadata, and the tensors of each module.

Finds the files of PEFT, diffusers, MLX, kohya and GGUF. Tensors of PEFT have names
``base_model.model.MODULE.PART[.ADAPTER][.weight]``; they are grouped by module, and checked against
each other and the config.

``--alpha`` or ``--alpha-is-rank`` gives α for adapters whose files give none; it never overrides an
α in a file. A PEFT file without its config is then read by the ranks of its factors.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, TypeGuard

from lora_diag.errors import Given, InputError, UsageError, damaged, quote
from lora_diag.storage import Checkpoint, Located, open_checkpoint
from lora_diag.storage.documents import MAX_CONFIG_BYTES, read_object
from lora_diag.storage.gguf import GgufFile
from lora_diag.storage.locating import find_named_weights

CONFIG = "adapter_config.json"
GGUF = ".gguf"

# PEFT's wrapper in the names of tensors.
PREFIX = "base_model.model."

# The user's α for a file without one; ``rank`` for α = r.
StatedAlpha = float | Literal["rank"] | None

# Names of weight files in an adapter folder: PEFT's, in its own order, then diffusers' and MLX's.
ADAPTER_WEIGHTS = (
    "adapter_model.safetensors",
    "adapter_model.bin",
    "pytorch_lora_weights.safetensors",
    "pytorch_lora_weights.bin",
    "adapters.safetensors",
)

# Largest number of float32: with a larger scale, no adapter can be applied.
MAX_NUMBER = 3.4028234663852886e38
MAX_WHOLE = 2**31  # ranks, blocks and terms


def is_number(value: object) -> TypeGuard[float]:
    """Return whether a value from JSON is a finite number in the range of float32."""
    return type(value) in {int, float} and abs(value) <= MAX_NUMBER  # type: ignore[arg-type]


@dataclass(frozen=True)
class Config:
    """The settings of an adapter, with their file.

    Args:
        path: The file.
        values: Its content.
    """

    path: Path
    values: Mapping[str, Any]

    @staticmethod
    def read(path: Path) -> Config:
        """Return the settings in an adapter's config file."""
        return Config(path, read_object(path, "adapter config", MAX_CONFIG_BYTES))

    def __contains__(self, key: str) -> bool:
        return self.values.get(key) is not None

    def integer(self, key: str, default: int | None = None) -> int:
        """Return a setting that is a positive whole number; ``default`` if it is absent.

        Raises:
            InputError: The value is null, missing without a default, not whole, below 1, or above
                2^31.
        """
        value = self.values.get(key, default)
        if type(value) is float and value.is_integer():
            value = int(value)
        if type(value) is not int or not 1 <= value <= MAX_WHOLE:
            raise InputError(
                f"{self.path}: {key} must be a whole number from 1 up, not {quote(value)}; correct "
                "it"
            )
        return value

    def number(self, key: str, default: float | None = None) -> float:
        """Return a setting that is a finite number; ``default`` if it is absent.

        Raises:
            InputError: The value is null, missing without a default, not a number, or beyond
                float32.
        """
        value = self.values.get(key, default)
        if not is_number(value):
            raise InputError(
                f"{self.path}: {key} must be a finite number in float32, not {quote(value)}; "
                "correct it"
            )
        return float(value)

    def flag(self, key: str) -> bool:
        """Return whether a setting is on; False if it is absent."""
        return bool(self.values.get(key))

    def text(self, key: str) -> str:
        """Return a setting as text; empty if absent or not text."""
        value = self.values.get(key)
        return value if isinstance(value, str) else ""

    def table(self, key: str) -> dict[str, Any]:
        """Return a mapping; empty if it is absent.

        Raises:
            InputError: The value is not a mapping.
        """
        value = self.values.get(key)
        if value is None:
            return {}
        if not isinstance(value, dict):
            raise damaged(
                self.path,
                f"{key} must map names to values, but is a {type(value).__name__}",
                "correct it",
            )
        return value

    def names(self, key: str) -> list[str]:
        """Return the names in a list; empty if it is absent or not a list."""
        value = self.values.get(key)
        return [item for item in value if isinstance(item, str)] if isinstance(value, list) else []


@dataclass(frozen=True)
class AdapterFiles:
    """An adapter, opened by its headers.

    Args:
        path: The path as given.
        checkpoint: Its tensors.
        config: Its settings; None without a config file.
        metadata: Metadata of the weights file.
        stated_alpha: The user's α for files without one.
        stored: The source as its files give it, if ``config`` holds values that only the user gave;
            else None.
    """

    path: Path
    checkpoint: Checkpoint
    config: Config | None
    metadata: Mapping[str, str]
    stated_alpha: StatedAlpha = None
    stored: AdapterFiles | None = None

    @property
    def peft_type(self) -> str:
        """PEFT's type of adapter, in capitals; empty if no config gives it."""
        return self.config.text("peft_type").upper() if self.config is not None else ""

    def scale_without_alpha(self, rank: int) -> float:
        """Return s of factors without α in the files: 1, or α/r with the given α."""
        return 1.0 if self.stated_alpha in (None, "rank") else float(self.stated_alpha) / rank

    def note_missing_alpha(self, modules: list[str], program: str) -> list[str]:
        """Return a note on modules without α in the files, if there are any; ``program`` is the one
        that reads them.
        """
        if not modules:
            return []
        assumption = (
            f"{program} then takes s = 1"
            if self.stated_alpha is None
            else "alpha = rank was given, s = 1"
        )
        if self.stated_alpha not in (None, "rank"):
            assumption = f"alpha = {self.stated_alpha:g} was given, s = {self.stated_alpha:g}/r"
        return [f"{len(modules)} modules give no alpha, such as {modules[0]}; {assumption}"]

    def shape(self, key: str, dimensions: int) -> tuple[int, ...]:
        """Return the shape of a tensor after checking its number of dimensions, and that it has
        entries.

        Raises:
            InputError: The shape is invalid.
        """
        shape = self.checkpoint[key].shape
        if len(shape) != dimensions or 0 in shape:
            raise damaged(
                self.checkpoint.path,
                f"{key} has shape {list(shape)} instead of {dimensions} dimensions",
            )
        return shape

    @property
    def settings(self) -> Config:
        """The config.

        Raises:
            InputError: There is none, so the scaling is unknown.
        """
        if self.config is None:
            problem = f"has no {CONFIG}, so the scaling of this adapter is unknown"
            raise damaged(
                self.path, problem, f"add the {CONFIG} it was trained with, or give $alpha"
            )
        return self.config


def open_source(located: Located, stated_alpha: StatedAlpha = None) -> AdapterFiles:
    """Open an adapter folder or file by its headers.

    Args:
        located: The folder or file.
        stated_alpha: α where the files give none.
    """
    path = located.path
    file = _find_weights(located.files) if located.files.is_dir() else located.files
    if (
        file.suffix == GGUF
    ):  # adapter_config.json in its folder, if any, describes the PEFT original
        opened = GgufFile(file)
        checkpoint = Checkpoint(path, "GGUF file", (opened,), opened.notes)
        return AdapterFiles(path, checkpoint, None, opened.metadata, stated_alpha)
    config_path = file.parent / CONFIG
    config = Config.read(config_path) if config_path.is_file() else None
    checkpoint = open_checkpoint(file)
    return AdapterFiles(path, checkpoint, config, checkpoint.files[0].metadata, stated_alpha)


def refuse_integers(source: AdapterFiles) -> None:
    """Refuse tensors other than floats, which no supported family has, except numbers without
    dimensions.

    Raises:
        InputError: A tensor is not a float.
    """
    for name in source.checkpoint:
        info = source.checkpoint[name]
        if not info.dtype.startswith(("float", "bfloat")) and len(info.shape) > 0:
            problem = f"{name} is stored as {info.dtype}, but an adapter's tensors must be floats"
            raise damaged(source.checkpoint.path, problem)


def find_single_file(folder: Path) -> Path | None:
    """Return the only safetensors or GGUF file of a folder; None with none, several or a full
    checkpoint.
    """
    if find_named_weights(folder) is not None:
        return None
    files = sorted([*folder.glob("*.safetensors"), *folder.glob(f"*{GGUF}")])
    return files[0] if len(files) == 1 else None


def _find_weights(folder: Path) -> Path:
    """Return the weights file of an adapter's folder.

    Raises:
        InputError: There is none.
    """
    named = (folder / name for name in ADAPTER_WEIGHTS)
    file = next((path for path in named if path.is_file()), None) or find_single_file(folder)
    if file is None:
        raise InputError(
            f"{folder}: no adapter weights found; the folder needs one of "
            f"{', '.join(ADAPTER_WEIGHTS)}"
        )
    return file


# module -> part -> the tensor's name in the file.
Modules = dict[str, dict[str, str]]


def drop_prefix(name: str) -> str:
    """Return a name without PEFT's wrapper.

    >>> drop_prefix("base_model.model.model.norm.weight")
    'model.norm.weight'
    """
    return name.removeprefix(PREFIX)


def group_by_module(
    names: Iterable[str], parts: tuple[str, ...], path: Path
) -> tuple[Modules, list[str]]:
    """Return tensor names by module and part, and those without a part.

    PEFT removes the adapter's name on saving (``lora_A.weight``); a manual dump still has it
    (``lora_A.default.weight``), which is accepted if there is only one.

    Args:
        names: All names of the file.
        parts: Names of the family's parts, such as ``lora_A``; a bias is the part ``lora_B.bias``.
        path: For the message.

    Returns:
        The parts of every module, and the names without a part.

    Raises:
        InputError: The file holds several adapters.

    Example:
        >>> group_by_module(
        ...     ["base_model.model.h.0.fc.lora_A.weight", "h.bias"], ("lora_A",), Path("x")
        ... )
        ({'h.0.fc': {'lora_A': 'base_model.model.h.0.fc.lora_A.weight'}}, ['h.bias'])
    """
    alternatives = "|".join(map(re.escape, parts))
    pattern = re.compile(
        rf"(?:(?P<module>.+)\.)?(?P<part>{alternatives})(?:\.(?!weight$|bias$)(?P<name>[^.]+))?(\.weight|(?P<bias>\.bias))?"
    )
    modules: Modules = {}
    unclaimed: list[str] = []
    adapters: set[str | None] = set()
    for name in names:
        match = pattern.fullmatch(drop_prefix(name))
        if match is None:
            unclaimed.append(name)
            continue
        adapters.add(match["name"])
        modules.setdefault(match["module"] or "", {})[match["part"] + (match["bias"] or "")] = name
    if len(adapters) > 1:
        adapter_names = ", ".join(sorted(name or "(no name)" for name in adapters))
        raise InputError(
            f"{path}: holds several adapters ({adapter_names}); save one of them separately"
        )
    return modules, unclaimed


def is_named(module: str, name: str) -> bool:
    """Return whether a name in a config matches a module: equal, or the module ends in ``.name``.

    >>> is_named("h.0.q_proj", "q_proj"), is_named("h.0.q_proj", "proj")
    (True, False)
    """
    return module == name or module.endswith(f".{name}")


def ends_of(module: str) -> Iterator[str]:
    """Yield the names that match a module by ``is_named``, the longest first.

    >>> list(ends_of("h.0.q_proj"))
    ['h.0.q_proj', '0.q_proj', 'q_proj']
    """
    yield module
    for index, character in enumerate(module, start=1):
        if character == ".":
            yield module[index:]


def find_pair(
    source: AdapterFiles, module: str, parts: dict[str, str], prefix: str = "lora_"
) -> tuple[str, str]:
    """Return the names of A and B of a module, which are its parts ``prefix`` + ``A`` and
    ``prefix`` + ``B``.

    Raises:
        InputError: A factor is missing, is empty, or has fewer than two dimensions.
    """
    for part in ("A", "B"):
        if prefix + part not in parts:
            other = parts.get(prefix + ("B" if part == "A" else "A"), module)
            problem = f"{module} has no {prefix}{part}, only {other}, so the file is incomplete"
            raise damaged(source.checkpoint.path, problem)
        shape = source.checkpoint[parts[prefix + part]].shape
        if len(shape) < 2 or 0 in shape:
            cause = "as saved under DeepSpeed ZeRO-3 or FSDP without gathering the shards"
            problem = f"{parts[prefix + part]} has shape {list(shape)}, {cause}"
            raise damaged(source.checkpoint.path, problem, "save the adapter again, gathered")
    return parts[prefix + "A"], parts[prefix + "B"]


def check_ranks(source: AdapterFiles, module: str, rank_a: int, expected: int, rank_b: int) -> None:
    """Check the ranks of a module's factors against each other and against the config.

    Raises:
        InputError: They differ, so that the scaling is unknown.
    """
    if rank_a != rank_b:
        raise damaged(
            source.checkpoint.path, f"{module}: A has rank {rank_a}, but B has rank {rank_b}"
        )
    if rank_a != expected:
        claim = f"{source.settings.path.name} says {expected}, so the scaling is unknown"
        fix = "give the config that this adapter was trained with"
        raise damaged(source.checkpoint.path, f"{module} has rank {rank_a}, but {claim}", fix)


_FACTORS = ("lora_A", "lora_B", "lora_embedding_A", "lora_embedding_B", "lora_magnitude_vector")


def get_stated_alpha(options: Mapping[str, Any]) -> StatedAlpha:
    """Return the α of the options ``alpha`` and ``alpha_is_rank``; ``rank`` for α = r, None without
    either.

    Raises:
        UsageError: Both are given, or α is zero or not finite.
    """
    alpha, is_rank = options.get("alpha"), bool(options.get("alpha_is_rank"))
    if alpha is not None and is_rank:
        raise UsageError(Given("alpha"), "contradicts $alpha_is_rank", "give only one of them")
    if alpha is not None and not (math.isfinite(alpha) and alpha != 0):
        raise UsageError(Given("alpha", alpha), "must be a finite number other than 0")
    return "rank" if is_rank else alpha


def add_config(source: AdapterFiles) -> AdapterFiles:
    """Return a source with the settings that are missing in a PEFT file, from the ranks of its
    factors and the given α.

    Without a given α, with α in the config, or if it is no PEFT LoRA, it is unchanged.
    """
    if source.stated_alpha is None:
        return source
    config = source.config
    if config is None and any(
        ".lora_A" in name or ".lora_embedding_A" in name for name in source.checkpoint
    ):
        return replace(
            source,
            config=Config(Path(f"{source.path} (--alpha)"), _make_settings(source)),
            stored=source,
        )
    if (
        config is not None
        and config.text("peft_type").upper() == "LORA"
        and "lora_alpha" not in config
    ):
        added: dict[str, Any] = {"lora_alpha": source.stated_alpha}
        if source.stated_alpha == "rank":
            added = {
                "lora_alpha": config.integer("r"),
                "alpha_pattern": config.table("rank_pattern"),
            }
        return replace(
            source, config=Config(config.path, {**config.values, **added}), stored=source
        )
    return source


def _make_settings(source: AdapterFiles) -> dict[str, Any]:
    """Return the settings of a PEFT file without a config, from the shapes of its factors and the
    given α.
    """
    modules, _ = group_by_module(source.checkpoint, _FACTORS, source.path)
    ranks = {
        module: source.checkpoint[parts[key]].shape[0]
        for module, parts in modules.items()
        for key in ("lora_A", "lora_embedding_A")
        if key in parts and source.checkpoint[parts[key]].shape
    }
    default_rank = Counter(ranks.values()).most_common(1)[0][0] if ranks else 1
    pattern = {
        f"^{re.escape(module)}": rank for module, rank in ranks.items() if rank != default_rank
    }
    return {
        "peft_type": "LORA",
        "r": default_rank,
        "lora_alpha": default_rank if source.stated_alpha == "rank" else source.stated_alpha,
        "rank_pattern": pattern,
        "alpha_pattern": pattern if source.stated_alpha == "rank" else {},
        "use_dora": any("lora_magnitude_vector" in parts for parts in modules.values()),
    }
