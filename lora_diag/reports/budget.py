"""The trainable parameters of a step of advice: the user's budget, or that of existing adapters."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from lora_diag.decisions.allocate.heads import heads_to_save, size_of
from lora_diag.decisions.allocate.record import Certificate
from lora_diag.diagnostics.residual.record import Residual
from lora_diag.reports.evidence import DEFAULT_RANK, Evidence, Source


def find_allocations(evidence: Evidence) -> Iterator[tuple[Source, Certificate]]:
    """Yield the allocations of the page with their certificates."""
    for source in evidence.sources:
        for record in source.results.whole:
            if isinstance(record, Certificate):
                yield source, record


def reference(evidence: Evidence) -> tuple[int, str]:
    """Return the number of parameters of a step, and their origin as text.

    The parameters of an allocation, requested by the user; else those of the largest adapter; else those of the default
    rank.
    """
    for source, certificate in find_allocations(evidence):
        return certificate.params, f"the budget of {source.name}"
    sizes = {path: params_of(evidence, path) for path in evidence.adapted}
    if sizes and (largest := max(sizes.values())):
        path = next(path for path, size in sizes.items() if size == largest)
        return largest + saved_params(evidence), f"as many as in {path}"
    default = sum(DEFAULT_RANK * sum(record.shape) for record in evidence.spectra)
    return default + saved_params(evidence), f"as many as with r={DEFAULT_RANK} everywhere"


def params_of(evidence: Evidence, path: str) -> int:
    """Return the number of parameters of an adapter's factors of matrices, Σ r(out + in)."""
    records: Sequence[Residual] = [
        record
        for source in evidence.of(Residual)
        for record in source.results
        if isinstance(record, Residual) and record.adapter == path and record.rank and len(record.shape) == 2
    ]
    return sum(record.rank * sum(record.shape) for record in {r.layer: r for r in records}.values() if record.rank)


def saved_params(evidence: Evidence) -> int:
    """Return the number of parameters of heads trained in full, which ``allocate`` pays for first."""
    if evidence.update is None:
        return 0
    results = evidence.update.results
    return size_of(heads_to_save(results.layers, results.left_out, None, None))
