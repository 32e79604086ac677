"""Spectrum records made up from singular values."""

import numpy as np

from lora_diag.records import Results, Run, RunInput, totals
from tests.building import layer_spectrum


def record(
    layer,
    shape,
    s,
    *,
    fro=None,
    complete=None,
    signal=None,
    verdict="resolved",
    error=0.0,
    base_fro=1.0,
    **more,
):
    """A record as ``spectrum`` writes it; ``fro`` beyond the values given makes them the first of
    more.
    """
    s = np.sort(np.asarray(s, dtype=np.float64))[::-1]
    seen = {"signal_rank": signal, "verdict": verdict}
    fields = {"fro": fro, "complete": complete, "energy_error": error, "base_fro": base_fro, **more}
    return layer_spectrum(layer, s, (8,), shape=shape, resolution=seen, **fields)


def results(*records, left_out=(), tensors=None):
    """The results of a finished run."""
    count = tensors or len(records)
    sides = [
        RunInput(role=role, path=role, kind="safetensors file", tensors=count)
        for role in ("base", "tuned")
    ]
    run = Run(command="spectrum", version="0", inputs=sides, settings={"ranks": [8]})
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
