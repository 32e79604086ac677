"""Results made by hand, line by line as JSON: what a gate is given, without measuring anything."""

import hashlib
import json
import math
from pathlib import Path

RANKS = (4, 8, 16)


def spectrum(layer: str, s=(4.0, 2.0, 1.0), base_fro: float = 100.0, verdict: str = "resolved", **changes) -> dict:
    """One record as the definitions have it: C(r), tails and ranks from the singular values given."""
    energy = [value**2 for value in s]
    total = math.fsum(energy)
    curve = [math.fsum(energy[: i + 1]) / total for i in range(len(s))] if total else []

    noise = {"resolved": 0.0, "floor-limited": 0.3, "unresolved": 0.9}[verdict] * math.sqrt(total)
    edge = noise * (1 / math.sqrt(24) + 1 / math.sqrt(32))

    def rank(share):
        return next((i for i, kept in enumerate(curve, 1) if kept >= share), 0)

    record = {
        "record": "spectrum",
        "layer": layer,
        "shape": [24, 32],
        "dtypes": ["float32", "float32"],
        "fro": math.sqrt(total),
        "base_fro": base_fro,
        "s": list(s),
        "complete": True,
        "method": "gram",
        "energy_error": 1e-10,
        "energy": {str(r): curve[min(r, len(s)) - 1] if total else None for r in RANKS},
        "rank_at": {share: rank(float(share)) for share in ("0.9", "0.95", "0.99")},
        "tail": {
            str(r): {"fro": math.sqrt(math.fsum(energy[r:])), "spectral": s[r] if r < len(s) else 0.0} for r in RANKS
        },
        "stable_rank": total / energy[0] if total else None,
        "effective_rank": math.exp(-sum(e / total * math.log(e / total) for e in energy if e)) if total else None,
        "resolution": {
            "unchanged": 0.0,
            "mantissa": [23, 23],
            "rounding_fro": 0.0,
            "noise_fro": noise,
            "edge": edge,
            "signal_rank": sum(value > edge for value in s),
            "verdict": verdict if total else "unresolved",
        },
    }
    return record | changes


def residual(
    layer: str, adapter: str, epsilon: float | None, role: str = "adapter", fro: float = 1.0, **changes
) -> dict:
    """One record: X = (1 + ε)D, or of the cosine given as long as it has to be for ε; zero where ``rank`` is 0."""
    none = dict.fromkeys(("epsilon_min", "excess", "energy_error"))
    cosine = changes.get("cosine", 1.0)
    ratio = cosine + math.sqrt(cosine**2 - 1 + (epsilon or 0.0) ** 2)
    best = math.sqrt(max(0.0, (epsilon or 0.0) ** 2 - ((1 - cosine / ratio) * ratio) ** 2))
    distance = {"norm_ratio": ratio, "cosine": cosine, "best_scale": cosine / ratio, "epsilon_best_scale": best}
    if epsilon is None or changes.get("adapter_fro") == 0 or changes.get("rank") == 0:
        distance = {**dict.fromkeys(distance), "norm_ratio": None if epsilon is None else 0.0}
    record = {
        "record": "residual",
        "layer": layer,
        "shape": [24, 32],
        "adapter": adapter,
        "role": role,
        "rank": 4,
        "epsilon": epsilon,
        **none,
        **distance,
        "fro": fro,
        "base_fro": 100.0,
        "adapter_fro": 1.0 if epsilon is None else fro * distance["norm_ratio"],
        "column_space": None,
        "row_space": None,
        "data": None,
        "limited_by": "rank",
        "resolution": None,
        "method": "made",
    }
    return record | changes


def left_out(layer: str, reason: str, shape=(24, 32), fro=None) -> dict:
    return {
        "record": "left_out",
        "layer": layer,
        "shape": list(shape),
        "reason": reason,
        "detail": f"because it is {reason}",
        "fro": fro,
        "base_fro": None,
    }


def lines(records, lost=(), inputs=(("base", "base/"), ("tuned", "tuned/")), finished=True, command=None) -> list[dict]:
    """All lines of a results file."""
    command = command or next((record["record"] for record in records), "spectrum")
    run = {
        "record": "run",
        "schema": 1,
        "command": command,
        "version": "0.1.0",
        "inputs": [{"role": role, "path": path, "kind": "made", "tensors": 3} for role, path in inputs],
        "settings": {"ranks": list(RANKS)},
    }
    layers = {record["layer"]: record for record in records if "layer" in record}
    norms = {name: [record.get(name) for record in layers.values()] for name in ("fro", "base_fro")}
    end = {
        "record": "end",
        "layers": len(layers),
        "left_out": len(lost),
        **{name: None if None in values else math.hypot(*values) for name, values in norms.items()},
    }
    return [run, *records, *lost, *([end] if finished else [])]


def sealed(records) -> str:
    """The text of a results file, with the hash of its lines in the last."""
    text = ""
    for record in records:
        digest = {"sha256": hashlib.sha256(text.encode()).hexdigest()} if record.get("record") == "end" else {}
        text += f"{json.dumps({**record, **digest})}\n"
    return text


def write(path: Path, records, lost=(), **changes) -> Path:
    path.write_text(sealed(lines(records, lost, **changes)))
    return path


LAYERS = tuple(f"model.layers.{i}.{name}.weight" for i in range(3) for name in ("self_attn.q_proj", "mlp.up_proj"))
