"""Records for tests, built from the fields of their models: a new field needs no edit here."""

import types
from collections.abc import Sequence
from typing import Annotated, Any, Literal, TypeVar, Union, get_args, get_origin

import numpy as np
from pydantic import BaseModel

from lora_diag.diagnostics.spectrum.record import Spectrum
from lora_diag.records import End, Results, Run, RunInput, Tail

R = TypeVar("R", bound=BaseModel)
PLAIN = {str: "x", int: 1, float: 1.0, bool: False, dict: {}}


def build(kind: type[R], /, **fields: Any) -> R:
    """Return a record with these fields; all others have their default, else null, else a plain
    value.
    """
    assert fields.keys() <= kind.model_fields.keys(), (
        f"{kind.__name__} has no {fields.keys() - kind.model_fields}"
    )
    required = {name: field for name, field in kind.model_fields.items() if field.is_required()}
    return kind(
        **{name: plain(field.annotation) for name, field in required.items() if name not in fields}
        | fields
    )


def plain(annotation: Any) -> Any:
    """Return a value of a type: null or empty where it may be."""
    origin, inner = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        return plain(inner[0])
    if origin in {Union, types.UnionType}:
        return None if type(None) in inner else plain(inner[0])
    if origin is Literal:
        return inner[0]
    if origin is tuple:
        return () if inner[-1] is ... else tuple(map(plain, inner))
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return build(annotation)
    return PLAIN[origin or annotation]


def layer_spectrum(
    layer: str,
    s: Sequence[float],
    ranks: Sequence[int] = (4, 8, 16),
    *,
    shape: tuple[int, int] | None = None,
    fro: float | None = None,
    complete: bool | None = None,
    resolution: dict[str, Any] | None = None,
    **fields: Any,
) -> Spectrum:
    """Return the record of a layer with these singular values; what follows from them is computed
    by its definition.

    Args:
        layer: Its name.
        s: The values kept, descending.
        ranks: Those of ``energy`` and ``tail``.
        shape: ``(out, in)``; as many rows as values, and twice as many columns.
        fro: ‖ΔW‖_F; of the values kept, if these are all.
        complete: Whether these are all; by the shape.
        resolution: Fields of the resolution.
        **fields: Other fields, and those that are not to follow from ``s``.
    """
    s = np.asarray(s, dtype=np.float64)
    shape = shape or (len(s), 2 * len(s))
    complete = len(s) == min(shape) if complete is None else complete
    energy = s**2
    total = float(energy.sum() if fro is None else fro**2)
    curve = np.minimum(np.cumsum(energy) / total, 1.0) if total else np.zeros(len(s))
    p = energy[energy > 0] / total if total else energy

    def kept(rank: int) -> float | None:
        return (
            float(curve[min(rank, len(s)) - 1]) if total and (complete or rank <= len(s)) else None
        )

    def reached(share: float) -> int | None:
        return next((i for i, c in enumerate(curve, 1) if c >= share - 1e-12), None) if total else 0

    def tail(rank: int) -> Tail | None:
        if not complete and rank >= len(s):
            return None
        return Tail(
            fro=float(energy[rank:].sum()) ** 0.5, spectral=float(s[rank]) if rank < len(s) else 0.0
        )

    derived = {
        "dtypes": ("float32", "float32"),
        "base_fro": 10.0,
        "energy": {str(r): kept(r) for r in ranks},
        "rank_at": {str(share): reached(share) for share in (0.9, 0.95, 0.99)},
        "tail": {str(r): tail(r) for r in ranks},
        "stable_rank": total / float(energy[0]) if total else None,
        "effective_rank": float(np.exp(-(p * np.log(p)).sum())) if complete and total else None,
    }
    known = {"unchanged": 0.0, "mantissa": (23, 23), "verdict": "resolved", "signal_rank": len(s)}
    zero = dict.fromkeys(("rounding_fro", "noise_fro", "edge"), 0.0)
    given = {"method": "gram", "energy_error": 0.0, "resolution": zero | known | (resolution or {})}
    values = {"s": tuple(s.tolist()), "fro": total**0.5, "shape": shape, "complete": complete}
    return build(Spectrum, layer=layer, **derived | given | values | fields)


def results(
    records: Sequence[Any],
    *,
    command: str = "spectrum",
    inputs: Sequence[tuple[str, str]] = (("base", "base"), ("tuned", "tuned")),
    left_out: Sequence[Any] = (),
    whole: Sequence[Any] = (),
    finished: bool = True,
    norms: float | None = None,
    **settings: Any,
) -> Results:
    """Return the results of a run of a command; ``norms`` are those of its end."""
    sides = tuple(
        RunInput(role=role, path=path, kind="safetensors file", tensors=9) for role, path in inputs
    )
    run = Run(command=command, version="0.1.0", inputs=sides, settings=settings)
    layers = len({getattr(record, "layer", record) for record in records})
    end = (
        End(layers=layers, left_out=len(left_out), fro=norms, base_fro=norms) if finished else None
    )
    return Results(run, tuple(records), tuple(left_out), end, tuple(whole))
