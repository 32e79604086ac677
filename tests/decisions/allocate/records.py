"""Spectrum records made up from singular values."""

import numpy as np

from lora_diag.diagnostics.spectrum.record import Spectrum
from lora_diag.records import Resolution, Results, Run, RunInput, totals


def record(
    layer, shape, s, *, fro=None, complete=None, signal=None, verdict="resolved", error=0.0, base_fro=1.0, **more
):
    """A record as ``spectrum`` writes it; ``fro`` beyond the values given makes them the first of more."""
    s = np.sort(np.asarray(s, dtype=np.float64))[::-1]
    total = float(np.sqrt((s**2).sum()))
    fro = total if fro is None else fro
    complete = len(s) == min(shape) if complete is None else complete
    curve = np.cumsum(s**2) / fro**2 if fro else np.zeros(len(s))
    reached = {str(t): next((i + 1 for i, c in enumerate(curve) if c >= t - 1e-12), None) for t in (0.9, 0.95, 0.99)}
    p = s**2 / total**2 if total else s
    return Spectrum(
        layer=layer,
        shape=shape,
        dtypes=("float32", "float32"),
        fro=fro,
        base_fro=base_fro,
        s=tuple(s.tolist()),
        complete=complete,
        method="gram",
        energy_error=error,
        energy={"8": None},
        rank_at=reached if fro else dict.fromkeys(reached, 0),
        tail={"8": None},
        stable_rank=None,
        effective_rank=float(np.exp(-sum(x * np.log(x) for x in p if x > 0))) if complete and total else None,
        resolution=Resolution(
            unchanged=0.0,
            mantissa=(23, 23),
            rounding_fro=0.0,
            noise_fro=0.0,
            edge=0.0,
            signal_rank=signal,
            verdict=verdict,
        ),
        **more,
    )


def results(*records, left_out=(), tensors=None):
    """The results of a finished run."""
    run = Run(
        command="spectrum",
        version="0",
        inputs=(
            RunInput(role="base", path="base", kind="safetensors file", tensors=tensors or len(records)),
            RunInput(role="tuned", path="tuned", kind="safetensors file", tensors=tensors or len(records)),
        ),
        settings={"ranks": [8]},
    )
    return Results(run, tuple(records), tuple(left_out), totals(records, left_out))


def llama(layers, seed=0, hidden=16, key=8, inner=24, decay=0.8):
    """Records of the matrices of a small Llama, spectra of random scale and decay."""
    rng = np.random.default_rng(seed)
    shapes = {
        "self_attn.q_proj": (hidden, hidden),
        "self_attn.k_proj": (key, hidden),
        "mlp.up_proj": (inner, hidden),
        "mlp.down_proj": (hidden, inner),
    }
    return [
        record(
            f"model.layers.{i}.{name}.weight",
            shape,
            rng.uniform(0.2, 2) * decay ** (np.arange(min(shape)) * rng.uniform(0.5, 2)),
        )
        for i in range(layers)
        for name, shape in shapes.items()
    ]
