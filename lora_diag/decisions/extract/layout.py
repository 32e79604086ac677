"""The treatment of each tensor by ``extract``: factors, stored in full, or skipped with a reason."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lora_diag.adapters import is_adapter, open_adapter
from lora_diag.adapters.source import StatedAlpha
from lora_diag.adapters.writing import CAUSAL, Described, Part, Value, write_adapter
from lora_diag.adapters.writing_check import check_written
from lora_diag.adapters.writing_targets import VERIFIED_MODELS, Model, Target, names_in_memory
from lora_diag.adapters.writing_unfactored import can_be_saved, full_values
from lora_diag.checkpoints import Checkpoint, locate
from lora_diag.decisions.extract.measure import left_out_matrix
from lora_diag.deltas import Delta, Pairing, stored_name
from lora_diag.errors import InputError
from lora_diag.records import LeftOut, Results
from lora_diag.running.engines import Layout
from lora_diag.running.measuring import without_rank

RESIZED = "its vocabulary was resized"


@dataclass(frozen=True)
class Plan:
    """The treatment of all tensors.

    Args:
        base: Base checkpoint.
        model: Its names in memory.
        pairing: Compared layers, and skipped tensors.
        targets: PEFT's view of each layer with factors.
        refused: Reasons for matrices without factors.
        save: Whether to store tensors without factors in full.
        portable: Whether the adapter has one rank for all layers, and only parts that all programs scale alike.
    """

    base: Checkpoint
    model: Model
    pairing: Pairing
    targets: Mapping[str, Target]
    refused: Mapping[str, str]
    save: bool
    portable: bool = False

    def notes(self) -> tuple[str, ...]:
        """Return notes for users of the adapter."""
        is_untested = self.model.type and self.model.type not in VERIFIED_MODELS and not self.model.has_names_in_memory
        note = (
            f"model type {self.model.type!r} has not been tested with PEFT: names on disk are assumed to equal "
            "those in memory, and PEFT ignores unknown names; watch for missing adapter keys when it loads the adapter"
        )
        return ((note,) if is_untested else ()) + self._describe_tied()

    def _describe_tied(self) -> tuple[str, ...]:
        table = stored_name(self.base, "lm_head.weight")
        target = self.targets.get(table or "")
        if target is None or target.kind != "embedding" or not CAUSAL.search(self._read_architecture()):
            return ()
        return (f"{table} is tied to the head: its update reaches the head only after merging",)

    def left_out(self, layout: Layout, device: str) -> Iterator[LeftOut]:
        """Yield the records of tensors without factors, with the norm of their change if it has one."""
        for record in without_rank(self.pairing, layout, device):
            yield self._mark_saved(record)
        for delta in self.pairing.deltas:
            if delta.layer in self.refused:
                yield self._mark_saved(left_out_matrix(delta, self.refused[delta.layer], device))

    def _mark_saved(self, record: LeftOut) -> LeftOut:
        """Return a record unchanged, or as that of a tensor stored in full."""
        if not self.save or not record.fro or record.reason not in {"vector", "no_factors", "added_rows"}:
            return record
        if not can_be_saved(self._name(record.layer), self.base, self.model):
            return record
        return record.model_copy(update={"reason": "saved", "detail": f"{record.detail}; stored in full"})

    def _name(self, layer: str) -> str:
        """Return the tensor of BASE for a layer."""
        return next((delta.base.name for delta in self.pairing.deltas if delta.layer == layer and delta.base), layer)

    def write(self, folder: Path, results: Results[Any], files: Mapping[str, Path], base_name: str) -> None:
        """Write the adapter's two files, read them back, and compare them with the measured factors.

        Args:
            folder: An existing folder.
            results: The rank of each layer, 0 for none, and the tensors saved in full.
            files: The factors of every layer.
            base_name: For the config.

        Raises:
            InputError: The files cannot be written, or differ when read back.
        """
        parts = [
            Part(self.targets[record.layer], record.rank, files[record.layer]) for record in results if record.rank
        ]
        write_adapter(
            folder, parts, self._collect_values(results, parts), self._describe_base(base_name), self.portable
        )
        check_written(folder, self.base, parts)

    def _collect_values(self, results: Results[Any], parts: list[Part]) -> list[Value]:
        names = {self._name(record.layer) for record in results.left_out if record.reason == "saved"}
        deltas: dict[str, Delta] = {delta.base.name: delta for delta in self.pairing.deltas if delta.base}
        adapted = {part.target.module for part in parts if part.target.kind != "parameter"}
        return full_values(sorted(names), deltas, self.base, self.model, adapted)

    def _read_architecture(self) -> str:
        classes = self.base.config.get("architectures")
        first = classes[0] if isinstance(classes, list) and classes else ""
        return first if isinstance(first, str) else ""

    def _describe_base(self, base_name: str) -> Described:
        modules = {self.model.in_memory(name).rpartition(".")[0] for name in self.base}
        return Described(
            base_name=base_name,
            architecture=self._read_architecture(),
            modules=frozenset(owner for module in modules for owner in _iterate_owners(module)),
            parameters=frozenset(self.model.parameter(name) for name in self.base),
        )


def _iterate_owners(module: str) -> Iterator[str]:
    """Yield a module and its parents: a target ``0`` also matches ``blocks.0``.

    >>> list(_iterate_owners("visual.blocks.0"))
    ['visual.blocks.0', 'visual.blocks', 'visual']
    """
    while module:
        yield module
        module = module.rpartition(".")[0]


def plan(
    base: Checkpoint,
    tuned: Path | str,
    pairing: Pairing,
    save: bool,
    portable: bool = False,
    stated_alpha: StatedAlpha = None,
) -> Plan:
    """Decide on the treatment of all tensors.

    Args:
        base: Base checkpoint.
        tuned: Fine-tuned checkpoint or an adapter, whose own names of modules are kept.
        pairing: The compared tensors.
        save: Whether to store tensors without factors in full.
        portable: Whether only matrices that all programs scale equally get factors.
        stated_alpha: α of an adapter whose files give none.

    Raises:
        InputError: Two updates change one weight of BASE, as with ``layer_replication``.
    """
    names = names_in_memory(open_adapter(locate(tuned), stated_alpha), base) if is_adapter(locate(tuned)) else {}
    model = Model(base, names)
    resized = {item.layer for item in pairing.unpaired if item.reason in {"added_rows", "removed_rows"}}
    targets: dict[str, Target] = {}
    refused: dict[str, str] = {}
    for delta in pairing.deltas:
        if not delta.is_matrix:
            continue
        target = RESIZED if save and delta.layer in resized else model.target(delta)
        if portable and isinstance(target, Target) and target.kind == "parameter":
            target = "stacked experts, which a portable adapter cannot hold"
        if isinstance(target, Target):
            targets[delta.layer] = target
        else:
            refused[delta.layer] = target
    _refuse_repeated(tuned, targets)
    return Plan(base, model, pairing, targets, refused, save, portable)


def _refuse_repeated(tuned: Path | str, targets: Mapping[str, Target]) -> None:
    first: dict[tuple[str, tuple[int, int], tuple[int, int]], str] = {}
    for layer, target in targets.items():
        earlier = first.setdefault((target.module, target.expert, target.half), layer)
        if earlier != layer:
            raise InputError(
                f"{tuned}: {earlier} and {layer} change one weight of BASE, as layer_replication does, and no adapter "
                "of BASE holds both; use this adapter unchanged, or exclude one of them with --exclude"
            )
