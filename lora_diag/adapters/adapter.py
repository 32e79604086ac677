"""An adapter, opened by its headers: its family, the adapted weights, and their ΔW."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from pathlib import Path

from lora_diag.adapters import diffusion, gguf, lora, lycoris, mlx, peft
from lora_diag.adapters.patterns import Scale, compute_scale
from lora_diag.adapters.placing import place_updates
from lora_diag.adapters.source import (
    AdapterFiles,
    StatedAlpha,
    add_config,
    open_source,
    refuse_integers,
)
from lora_diag.adapters.updates import AdapterReading
from lora_diag.deltas import Pairing, natural_order
from lora_diag.errors import InputError
from lora_diag.records.run import AdaptedWeight
from lora_diag.storage import Checkpoint, Located, locate_files

# Tried in this order; PEFT's adapters name their type, GGUF is a format of files, the others have
# their own keys.
FAMILIES = (
    gguf.FAMILY,
    lora.FAMILY,
    *lycoris.FAMILIES,
    *peft.FAMILIES,
    *diffusion.FAMILIES,
    mlx.FAMILY,
)

# vLLM serves ranks up to its --max-lora-rank, 16 by default; hosted services usually stop at 64.
SERVED_RANK = 64
SERVED_RANK_NOTE = f"servers of adapters usually stop at {SERVED_RANK} or below"


@dataclass(frozen=True)
class Adapter:
    """An adapter.

    Args:
        source: The adapter's files.
        reading: The contents of the files.
        form: The layout of the files: ``peft``, ``kohya``, ``diffusers``, ``mlx`` or ``gguf``.
    """

    source: AdapterFiles
    reading: AdapterReading
    form: str

    @property
    def path(self) -> Path:
        """The path as given."""
        return self.source.path

    @property
    def checkpoint(self) -> Checkpoint:
        """The tensors of its file."""
        return self.source.checkpoint

    @property
    def kind(self) -> str:
        """Its description, such as ``PEFT LoRA, r=8, alpha=16, 14 modules``."""
        return self.reading.kind

    @property
    def notes(self) -> tuple[str, ...]:
        """Notes on the adapter."""
        return (*self.reading.notes, *self.checkpoint.notes)

    def weights(self) -> tuple[AdaptedWeight, ...]:
        """Return the changed weights, in natural order of their names, without optional biases and
        copies.
        """
        changed = [
            AdaptedWeight(
                layer=update.layer,
                shape=update.shape,
                form="factored" if update.factored else "dense",
                dtype=update.dtype,
                rank=update.rank,
                scaling=update.scale,
                needs_base=update.needs_weight,
            )
            for update in self.reading.updates
            if not update.optional
        ]
        for value in self.reading.values:
            info = self.checkpoint[value.key]
            if not value.is_copy:
                changed.append(
                    AdaptedWeight(
                        layer=value.weight, shape=info.shape, form="value", dtype=info.dtype
                    )
                )
        return tuple(sorted(changed, key=lambda weight: natural_order(weight.layer)))

    def scaling(self) -> tuple[float, float] | None:
        """Return the smallest and the largest scaling of the updates, reading α where it is stored;
        None without any.
        """
        scales = [update.scale for update in self.reading.updates if update.scale is not None]
        stored = {update.alpha: update.rank for update in self.reading.updates if update.alpha}
        scales += [
            compute_scale(self.checkpoint, Scale(1.0, alpha, rank or 1))
            for alpha, rank in stored.items()
        ]
        finite = list(filter(math.isfinite, scales))
        return (min(finite), max(finite)) if finite else None

    def warnings(self) -> tuple[str, ...]:
        """Return warnings on a large rank and on updates that are zero; read the tensors that are
        initialized to zero.
        """
        keys = dict.fromkeys(update.zero_if for update in self.reading.updates if update.zero_if)
        rank = max((update.rank or 0 for update in self.reading.updates), default=0)
        warnings = [f"rank {rank}: {SERVED_RANK_NOTE}"] if rank > SERVED_RANK else []
        if zero := [
            key
            for key, is_zero in zip(keys, self.checkpoint.are_zero(keys), strict=True)
            if is_zero
        ]:
            cause = f"a factor was never trained, such as {zero[0]}"
            warnings.append(f"{len(zero)} of {len(keys)} updates are zero: {cause}")
        return tuple(warnings)

    def pair(
        self,
        base: Checkpoint | None,
        layers: str | None = None,
        exclude: str | None = None,
        allow_unmatched: bool = False,
    ) -> tuple[Pairing, tuple[str, ...]]:
        """Return the named ΔW with the skipped tensors, and notes with the warnings; see
        ``place_updates``.
        """
        pairing, notes = place_updates(
            self.source, self.reading, base, layers, exclude, allow_unmatched
        )
        return pairing, (*self.notes, *self.warnings(), *notes)


def open_adapter(path: Path | str, stated_alpha: StatedAlpha = None) -> Adapter:
    """Open an adapter folder or file by its headers; see ``read_adapter``.

    Args:
        path: An adapter folder, an adapter's weights file, the Hub id of a folder, or an address.
        stated_alpha: α where the files give none; ``rank`` for α = r.

    Raises:
        InputError: ``locate_files`` or ``read_adapter`` refuses it.
    """
    return read_adapter(locate_files(path), stated_alpha)


def read_adapter(located: Located, stated_alpha: StatedAlpha = None) -> Adapter:
    """Open an adapter by its headers; only files in torch's legacy format are loaded whole.

    Args:
        located: The adapter's folder or weights file.
        stated_alpha: As in ``open_adapter``.

    Raises:
        InputError: The files cannot be read, the kind of adapter is not supported, its tensors and
            settings are invalid or do not fit together, or it changes no weight.
    """
    source = open_source(located, stated_alpha)
    note_on_alpha = "its files give alpha or a scale; the one that is stated is not used"
    is_peft = not (diffusion.is_kohya(source) or diffusion.is_diffusers(source))
    if is_peft and (completed := add_config(source)) is not source:
        source, note_on_alpha = (
            completed,
            f"its files give no lora_alpha; alpha = {stated_alpha} was given",
        )
    for family in FAMILIES:
        if family.claims(source):
            refuse_integers(source)
            return Adapter(
                source, _add_notes(source, family.read(source), note_on_alpha), family.form
            )
    raise peft.make_unsupported_error(source)


def _add_notes(source: AdapterFiles, reading: AdapterReading, note_on_alpha: str) -> AdapterReading:
    """Return a reading with notes on an activated LoRA, a given α and unused tensors.

    Raises:
        InputError: The adapter changes no weight.
    """
    if not reading.updates and not reading.values:
        raise InputError(
            f"{source.path}: holds no tensor that changes a weight; give the adapter's weights file"
        )
    notes = list(reading.notes)
    is_activated = source.config is not None and source.config.flag("alora_invocation_tokens")
    if is_activated or "adapter.alora.invocation_tokens" in (gguf.get_fields(source) or {}):
        effect = "it acts only after its invocation tokens, so no merged model does what it does"
        notes.append(f"an activated LoRA: {effect}")
    if source.stated_alpha is not None and not any("was given" in note for note in notes):
        notes.append(note_on_alpha)
    if reading.ignored:
        notes.append(
            f"{len(reading.ignored)} tensors of the file change no weight: "
            f"{', '.join(reading.ignored[:3])}"
        )
    return replace(reading, notes=tuple(notes))
