"""Allocation of a budget of parameters by the estimated singular values of all layers, as in ``allocate``."""

from __future__ import annotations

from collections.abc import Iterable

from lora_diag.decisions.allocate.allocation import Budget, allocate
from lora_diag.decisions.recover.record import Recovery
from lora_diag.diagnostics.spectrum.record import Spectrum
from lora_diag.records import Resolution


def ranks_within(records: Iterable[Recovery], params: int) -> dict[str, int]:
    """Return the rank of every layer of a run, 0 for those without directions to write.

    Args:
        records: The estimates.
        params: Budget: parameters of all factors, r·(out + in).

    Raises:
        UsageError: The budget is too small for rank 1, or adapters usually target none of the layers.
    """
    spectra = [spectrum_of(record) for record in records if record.values_estimate]
    chosen = allocate(spectra, Budget("params", params, f"--params {params}"), save_heads=False)
    return {record.layer: record.rank for record in chosen.layers}


def spectrum_of(record: Recovery) -> Spectrum:
    """Return the singular values that a layer can be given as a spectrum, one for each direction."""
    assert record.values_estimate is not None
    values = record.values_estimate
    return Spectrum(
        layer=record.layer,
        shape=record.shape,
        dtypes=record.dtypes,
        fro=record.fro_estimate or record.fro,
        base_fro=record.base_fro,
        s=values,
        complete=False,
        method=record.method,
        energy_error=0.0,
        energy={},
        rank_at={},
        tail={},
        stable_rank=None,
        effective_rank=None,
        resolution=Resolution(
            unchanged=record.unchanged,
            mantissa=None,
            rounding_fro=0.0,
            noise_fro=0.0,
            edge=0.0,
            signal_rank=len(values),
            verdict="resolved",
        ),
    )
