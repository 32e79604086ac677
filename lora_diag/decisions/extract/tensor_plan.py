"""The treatment of each tensor of an adapter to be written: factors, stored in full, or skipped."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lora_diag.adapters.writing import (
    CAUSAL,
    Described,
    LayerFactors,
    can_be_saved,
    check_written,
    list_full_values,
    write_adapter,
)
from lora_diag.adapters.writing_targets import VERIFIED_MODELS, MemoryModel, PeftTarget
from lora_diag.decisions.extract.measure import measure_left_out
from lora_diag.deltas import Delta, Pairing, stored_name
from lora_diag.errors import InputError
from lora_diag.records import LeftOut
from lora_diag.running.engines import MachineLayout
from lora_diag.running.inputs import Comparison
from lora_diag.running.layers import leave_out
from lora_diag.storage import Checkpoint

RESIZED = "its vocabulary was resized"


@dataclass(frozen=True)
class TensorPlan:
    """The treatment of all tensors.

    Args:
        base: Base checkpoint.
        model: Names of its tensors in memory.
        pairing: Compared layers, and skipped tensors.
        targets: PEFT's view of each layer with factors.
        refused: Why a matrix gets no factors, by layer.
        save: Whether to store tensors without factors in full.
        portable: Whether the adapter has one rank for all layers, and only parts that all programs
            scale alike.
    """

    base: Checkpoint
    model: MemoryModel
    pairing: Pairing
    targets: Mapping[str, PeftTarget]
    refused: Mapping[str, str]
    save: bool
    portable: bool = False

    def list_notes(self) -> tuple[str, ...]:
        """Return notes for users of the adapter: on untested names, and on factors of an embedding
        tied to the head.
        """
        notes = []
        if (
            self.model.type
            and self.model.type not in VERIFIED_MODELS
            and not self.model.has_names_in_memory
        ):
            notes.append(
                f"model type {self.model.type!r} has not been tested with PEFT: names on disk are "
                "assumed to equal those in memory, and PEFT ignores unknown names; watch for "
                "missing adapter keys when it loads the adapter"
            )
        table = stored_name(self.base, "lm_head.weight")
        target = self.targets.get(table or "")
        if (
            target is not None
            and target.kind == "embedding"
            and CAUSAL.search(self._read_architecture())
        ):
            notes.append(
                f"{table} is tied to the head: its update reaches the head only after merging"
            )
        return tuple(notes)

    def measure_left_out(self, layout: MachineLayout, device: str) -> Iterator[LeftOut]:
        """Yield the records of tensors without factors, with the norm of their change if it has
        one.
        """
        for record in leave_out(self.pairing, layout, device):
            yield self._mark_saved(record)
        for delta in self.pairing.deltas:
            if delta.layer in self.refused:
                yield self._mark_saved(measure_left_out(delta, self.refused[delta.layer], device))

    def _mark_saved(self, record: LeftOut) -> LeftOut:
        """Return a record with the reason ``saved`` if its tensor is to be stored in full; else
        unchanged.
        """
        if (
            not self.save
            or not record.fro
            or record.reason not in {"vector", "no_factors", "added_rows"}
        ):
            return record
        if not can_be_saved(self._find_base_name(record.layer), self.base, self.model):
            return record
        return record.model_copy(
            update={"reason": "saved", "detail": f"{record.detail}; stored in full"}
        )

    def _find_base_name(self, layer: str) -> str:
        """Return the name of the tensor of BASE that holds a layer; the layer's name
        without one.
        """
        return next(
            (
                delta.base.name
                for delta in self.pairing.deltas
                if delta.layer == layer and delta.base
            ),
            layer,
        )

    def write(
        self,
        folder: Path,
        results: Iterable[Any],
        left_out: Iterable[LeftOut],
        files: Mapping[str, Path],
        base_name: str,
        metadata: Mapping[str, str] | None = None,
    ) -> None:
        """Write the adapter's two files, read them back, and compare them with the measured
        factors.

        Args:
            folder: An existing folder.
            results: The rank of each layer, 0 for none: one record per layer.
            left_out: The tensors to store in full, and others.
            files: File with the factors of each layer.
            base_name: Name of the base model for the config.
            metadata: Metadata of the weights file, besides its format.
        """
        parts = [
            LayerFactors(self.targets[r.layer], r.rank, files[r.layer]) for r in results if r.rank
        ]
        names = {
            self._find_base_name(record.layer) for record in left_out if record.reason == "saved"
        }
        deltas: dict[str, Delta] = {
            delta.base.name: delta for delta in self.pairing.deltas if delta.base
        }
        adapted = {part.target.module for part in parts if part.target.kind != "parameter"}
        values = list_full_values(sorted(names), deltas, self.base, self.model, adapted)
        write_adapter(
            folder, parts, values, self._describe_base(base_name), self.portable, metadata
        )
        check_written(folder, self.base, parts)

    def _read_architecture(self) -> str:
        """Return the first class in the config of BASE; empty without one."""
        classes = self.base.config.get("architectures")
        first = classes[0] if isinstance(classes, list) and classes else ""
        return first if isinstance(first, str) else ""

    def _describe_base(self, base_name: str) -> Described:
        """Return what the config of an adapter depends on: name, class, modules and parameters of
        BASE.
        """
        modules = {self.model.in_memory(name).rpartition(".")[0] for name in self.base} - {""}
        # With the parents of every module: a target ``0`` also matches ``blocks.0``.
        modules |= {
            module[: dot.start()] for module in modules for dot in re.finditer(r"\.", module)
        }
        return Described(
            base_name=base_name,
            architecture=self._read_architecture(),
            modules=frozenset(modules),
            parameters=frozenset(self.model.parameter(name) for name in self.base),
        )


def plan_tensors(compared: Comparison, save: bool, portable: bool = False) -> TensorPlan:
    """Return the treatment of all tensors.

    Args:
        compared: BASE, and a fine-tuned checkpoint or an adapter, whose own names of modules are
            kept.
        save: Whether to store tensors without factors in full; a resized vocabulary then gets no
            factors.
        portable: Whether only matrices that all programs scale equally get factors.
    """
    base, tuned, pairing = compared.base, compared.update, compared.pairing
    assert base is not None
    model = MemoryModel(base, pairing.own_names)
    resized = {
        item.layer for item in pairing.unpaired if item.reason in {"added_rows", "removed_rows"}
    }
    targets: dict[str, PeftTarget] = {}
    refused: dict[str, str] = {}
    for delta in pairing.deltas:
        if not delta.is_matrix:
            continue
        target = RESIZED if save and delta.layer in resized else model.find_target(delta)
        if portable and isinstance(target, PeftTarget) and target.kind == "parameter":
            target = "stacked experts, which a portable adapter cannot hold"
        if isinstance(target, PeftTarget):
            targets[delta.layer] = target
        else:
            refused[delta.layer] = target
    _refuse_repeated(tuned.path, targets)
    return TensorPlan(base, model, pairing, targets, refused, save, portable)


def _refuse_repeated(tuned: Path, targets: Mapping[str, PeftTarget]) -> None:
    """Refuse two layers that change one weight of BASE.

    Raises:
        InputError: Such layers exist, as with ``layer_replication``.
    """
    first: dict[tuple[str, tuple[int, int], tuple[int, int]], str] = {}
    for layer, target in targets.items():
        earlier = first.setdefault((target.module, target.expert, target.half), layer)
        if earlier != layer:
            raise InputError(
                tuned,
                f"{earlier} and {layer} change one weight of BASE, as layer_replication "
                "does, and no adapter of BASE holds both",
                "use this adapter unchanged, or exclude one of them with $exclude",
            )
