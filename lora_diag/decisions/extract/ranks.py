"""The rank of each layer: one value for all, a rule, or an allocation."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from lora_diag.adapters.writing_ranks import ranks_of_config
from lora_diag.adapters.writing_targets import Target
from lora_diag.catalog import read_results_of
from lora_diag.decisions.allocate.allocation import Budget, allocate
from lora_diag.decisions.allocate.record import Allocation
from lora_diag.decisions.extract.measure import Rank
from lora_diag.diagnostics.spectrum.record import Spectrum
from lora_diag.errors import InputError, UsageError
from lora_diag.records import Results, is_results_file

RANK_OPTIONS = "--rank R, --energy FRACTION, --params N, --allocation FILE or --signal"


@dataclass(frozen=True, slots=True)
class RankRule:
    """The requested rule for ranks; exactly one field is set.

    Args:
        rank: The same for every layer.
        energy: Fraction of each layer's energy to keep.
        params: Number of parameters of the whole adapter.
        allocation: File with the rank of every layer.
        signal: Number of singular values above the files' rounding noise.
    """

    rank: int | None = None
    energy: float | None = None
    params: int | None = None
    allocation: Path | str | None = None
    signal: bool = False

    def check(self) -> None:
        """Check the options.

        Raises:
            UsageError: Not exactly one is given, or a number is out of range.
        """
        chosen = [value for value in (self.rank, self.energy, self.params, self.allocation) if value is not None]
        if len(chosen) + self.signal != 1:
            raise UsageError(f"extract: ranks need exactly one option; give {RANK_OPTIONS}")
        if self.rank is not None and self.rank < 1:
            raise UsageError(f"--rank {self.rank}: must be a whole number from 1 up")
        if self.energy is not None and not 0 < self.energy <= 1:
            raise UsageError(f"--energy {self.energy}: must be a fraction above 0 and up to 1")

    def words(self) -> str:
        """Return the option as typed."""
        if self.signal:
            return "--signal"
        name, value = next(
            (name, value)
            for name in ("rank", "energy", "params", "allocation")
            if (value := getattr(self, name)) is not None
        )
        return f"--{name} {value}"


def ranks_for(
    requested: RankRule, targets: Mapping[str, Target], spectra: Callable[[], Results[Spectrum]]
) -> dict[str, Rank]:
    """Return the rule for the rank of every layer.

    Args:
        requested: The requested rule.
        targets: PEFT's view of each layer.
        spectra: Measures the spectra of all layers; used for a budget.

    Raises:
        InputError: The file of ranks cannot be read, or does not belong to these layers.
        UsageError: The budget is too small.
    """
    if requested.params is not None:
        measured = spectra()
        reachable = tuple(record.before_rounding() for record in measured if record.layer in targets)
        budget = Budget("params", requested.params, f"--params {requested.params}")
        # Heads are layers here: tensors without factors are lost, unless --unfactored save keeps them.
        chosen = {record.layer: record.rank for record in allocate(reachable, budget, save_heads=False).layers}
    elif requested.allocation is not None:
        chosen = _read(Path(requested.allocation), targets)
    else:
        return dict.fromkeys(targets, Rank(requested.rank, requested.energy, requested.signal))
    return {layer: Rank(chosen.get(layer, 0)) for layer in targets}


def _read(path: Path, targets: Mapping[str, Target]) -> dict[str, int]:
    """Read the ranks of layers from a results file of ``allocate`` or from a PEFT config."""
    if not is_results_file(path):
        return ranks_of_config(path / "adapter_config.json" if path.is_dir() else path, targets)
    ranks = {record.layer: record.rank for record in read_results_of(Allocation, path)}
    unknown = sorted(layer for layer, rank in ranks.items() if rank and layer not in targets)
    if unknown:
        raise InputError(
            f"{path}: gives ranks to {len(unknown)} unknown layers, such as {unknown[0]}, but layers have names "
            f"like {next(iter(targets), '(none)')}; use ranks of the same pair, with the same --layers and --exclude"
        )
    return ranks
