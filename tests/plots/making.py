"""Records made by hand, their numbers by NumPy; nothing here calls the package's own mathematics."""

import numpy as np

from lora_diag.results import (
    Allocation,
    Baseline,
    Certificate,
    End,
    Overlap,
    Residual,
    Resolution,
    Results,
    Run,
    RunInput,
    Spectrum,
)

TYPES = (
    "self_attn.q_proj",
    "self_attn.k_proj",
    "self_attn.v_proj",
    "self_attn.o_proj",
    "mlp.gate_proj",
    "mlp.up_proj",
    "mlp.down_proj",
)


def spectrum(layer, s, *, fro=None, complete=True, edge=0.0, signal=None, verdict="resolved", ranks=(8, 16)):
    """Return the record of a layer with these singular values."""
    s = np.asarray(s, dtype=np.float64)
    fro = float(np.sqrt((s**2).sum())) if fro is None else fro
    share = {str(r): float((s[:r] ** 2).sum() / fro**2) if fro and r <= len(s) else None for r in ranks}
    return Spectrum(
        layer=layer,
        shape=(len(s), 2 * len(s)),
        dtypes=("bfloat16", "bfloat16"),
        fro=fro,
        base_fro=10.0,
        s=tuple(s.tolist()),
        complete=complete,
        method="exact",
        energy_error=0.0,
        energy=share,
        rank_at={"0.9": 3, "0.95": None, "0.99": None},
        tail={str(r): None for r in ranks},
        stable_rank=float(fro**2 / s[0] ** 2) if fro else None,
        effective_rank=None,
        resolution=Resolution(
            unchanged=0.1,
            mantissa=(7, 7),
            rounding_fro=0.1,
            noise_fro=0.05,
            edge=edge,
            signal_rank=len(s) if signal is None else signal,
            verdict=verdict,
        ),
    )


def decay(number, values=32):
    """Return a spectrum that no other layer has."""
    return (1 + 0.1 * number) * np.arange(1, values + 1.0) ** -(0.4 + 0.01 * (number % 50))


def model(blocks, types=TYPES, values=32, **more):
    """Return the spectra of a model of so many blocks."""
    return [
        spectrum(f"model.layers.{block}.{name}.weight", decay(block * len(types) + place, values), **more)
        for block in range(blocks)
        for place, name in enumerate(types)
    ]


def residual(layer, fro, other, cosine, epsilon_min, *, adapter="runs/lora_r8", rank=8, role="adapter"):
    """Return the record of an adapter whose distance follows from norms, an angle and a floor."""
    gap2 = fro**2 + other**2 - 2 * cosine * fro * other
    none = fro == 0
    epsilon = None if none else float(np.sqrt(gap2)) / fro
    return Residual(
        layer=layer,
        shape=(32, 64),
        adapter=adapter,
        role=role,
        rank=rank,
        fro=fro,
        base_fro=10.0,
        adapter_fro=other,
        method="exact",
        energy_error=0.0,
        epsilon=epsilon,
        epsilon_min=None if none else epsilon_min,
        excess=None if none or epsilon_min is None else epsilon**2 - epsilon_min**2,
        norm_ratio=None if none else other / fro,
        cosine=None if none or other == 0 else cosine,
        best_scale=None if none or other == 0 else cosine * fro / other,
        epsilon_best_scale=None if none or other == 0 else float(np.sqrt(1 - cosine**2)),
        column_space=None,
        row_space=None,
        data=None,
        limited_by=None if none else "not adapted" if other == 0 else "direction",
        resolution=None,
    )


def residuals(blocks, types=TYPES, adapter="runs/lora_r8"):
    rng = np.random.default_rng(len(adapter) + blocks)
    return [
        residual(
            f"model.layers.{block}.{name}.weight",
            *(1 + rng.random(), 1 + rng.random(), 0.2 + 0.5 * rng.random(), 0.5),
            adapter=adapter,
        )
        for block in range(blocks)
        for name in types
    ]


def overlap(layer, step, rank, kappa, tangent):
    return Overlap(
        layer=layer,
        shape=(32, 64),
        step=step,
        rank=rank,
        kappa=kappa,
        kappa_random=rank / np.sqrt(32 * 64),
        tangent=tangent,
        tangent_random=float(np.sqrt(rank / 32 + rank / 64 - rank**2 / 2048)),
        left=tangent,
        left_random=0.1,
        right=tangent,
        right_random=0.1,
        gradient_fro=1.0,
        method="exact",
        verdict="resolved",
    )


def overlaps(blocks, types=TYPES, steps=(0, 40, 200), ranks=(4, 8)):
    rng = np.random.default_rng(blocks)
    return [
        overlap(f"model.layers.{block}.{name}.weight", step, rank, 0.3 * rng.random(), 0.5 + 0.3 * rng.random())
        for block in range(blocks)
        for name in types
        for step in steps
        for rank in ranks
    ]


def allocations(blocks, types=TYPES):
    rng = np.random.default_rng(blocks)
    found = []
    for block in range(blocks):
        for name in types:
            rank = int(rng.integers(0, 20))
            found.append(
                Allocation(
                    layer=f"model.layers.{block}.{name}.weight",
                    shape=(32, 64),
                    rank=rank,
                    params=96 * rank,
                    kept=0.4,
                    fro=1.0,
                    cap=32,
                    capped_by="shape",
                    uniform_rank=8,
                    uniform_kept=0.3,
                )
            )
    return found


def certificate(spent=1000, kept=0.5, bound=0.51):
    return Certificate(
        unit="params",
        budget=float(spent),
        spent=float(spent),
        params=spent,
        kept=kept,
        bound=bound,
        gap=(bound - kept) / bound,
        baselines=(Baseline(name="uniform r=8", spent=0.9 * spent, kept=0.9 * kept, equal=kept, epsilon_min=0.8),),
    )


def results(records, whole=(), name="tuned", settings=None):
    kind = records[0].record if records else "spectrum"
    run = Run(
        command="allocate" if kind == "allocation" else kind,
        version="0",
        inputs=(
            RunInput(role="base", path="models/base", kind="", tensors=1),
            RunInput(role="tuned", path=f"models/{name}", kind="", tensors=1),
        ),
        settings=settings or {"ranks": [8, 16]},
    )
    end = End(layers=len(records), left_out=0, fro=None, base_fro=None)
    return Results(run, tuple(records), (), end, tuple(whole))
