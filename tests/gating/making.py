"""Results files of made-up records: what a gate is given, without measuring anything."""

import hashlib
import json
import math
from datetime import date
from pathlib import Path

from lora_diag.diagnostics.residual.record import Residual
from lora_diag.gating.policy import Policy, read_policy
from lora_diag.gating.run import gate
from lora_diag.records import LeftOut
from lora_diag.records.verdict import Verdict, outcome
from tests.building import build, layer_spectrum, results

RANKS = (4, 8, 16)
TODAY = date(2026, 11, 25)
ADAPTER = (("base", "b"), ("adapter", "a"))


def spectrum(
    layer: str, s=(4.0, 2.0, 1.0), base_fro=100.0, verdict: str = "resolved", **changes
) -> dict:
    """One record of all singular values, whose other numbers follow from them; the noise follows
    from the verdict.
    """
    fro = math.hypot(*s)
    noise = {"resolved": 0.0, "floor-limited": 0.3, "unresolved": 0.9}[verdict] * fro
    edge = noise * (1 / math.sqrt(24) + 1 / math.sqrt(32))
    seen = {"noise_fro": noise, "edge": edge, "signal_rank": sum(value > edge for value in s)}
    seen["verdict"] = verdict if fro else "unresolved"
    record = layer_spectrum(
        layer, s, RANKS, shape=(24, 32), complete=True, base_fro=base_fro, resolution=seen
    )
    return record.model_dump(mode="json") | changes


def residual(
    layer: str,
    adapter: str,
    epsilon: float | None,
    role: str = "adapter",
    fro: float = 1.0,
    **changes,
) -> dict:
    """One record: X = (1 + ε)D, or of the cosine given as long as it has to be for ε; zero where
    ``rank`` is 0.
    """
    cosine = changes.get("cosine", 1.0)
    ratio = cosine + math.sqrt(cosine**2 - 1 + (epsilon or 0.0) ** 2)
    best = math.sqrt(max(0.0, (epsilon or 0.0) ** 2 - ((1 - cosine / ratio) * ratio) ** 2))
    distance = {
        "norm_ratio": ratio,
        "cosine": cosine,
        "best_scale": cosine / ratio,
        "epsilon_best_scale": best,
    }
    if epsilon is None or changes.get("adapter_fro") == 0 or changes.get("rank") == 0:
        distance = {**dict.fromkeys(distance), "norm_ratio": None if epsilon is None else 0.0}
    adapter_fro = 1.0 if epsilon is None else fro * distance["norm_ratio"]
    known = {
        "shape": (24, 32),
        "adapter": adapter,
        "role": role,
        "rank": 4,
        "limited_by": "rank",
        "base_fro": 100.0,
    }
    record = build(
        Residual,
        layer=layer,
        **known,
        epsilon=epsilon,
        **distance,
        fro=fro,
        adapter_fro=adapter_fro,
        method="made",
    )
    return record.model_dump(mode="json") | changes


def left_out(layer: str, reason: str, shape=(24, 32), fro=None) -> dict:
    detail = f"because it is {reason}"
    return LeftOut(layer=layer, shape=shape, reason=reason, detail=detail, fro=fro).model_dump(
        mode="json"
    )


def lines(
    records, lost=(), inputs=(("base", "base/"), ("tuned", "tuned/")), finished=True, command=None
) -> list[dict]:
    """All lines of a results file."""
    command = command or next((record["record"] for record in records), "spectrum")
    run = results((), command=command, inputs=inputs, ranks=list(RANKS)).run.model_dump(mode="json")
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
        digest = (
            {"sha256": hashlib.sha256(text.encode()).hexdigest()}
            if record.get("record") == "end"
            else {}
        )
        text += f"{json.dumps({**record, **digest})}\n"
    return text


def write(path: Path, records, lost=(), **changes) -> Path:
    path.write_text(sealed(lines(records, lost, **changes)))
    return path


def judge(
    policy: Policy | str, *files, today: date = TODAY, **options
) -> tuple[str, tuple[Verdict, ...]]:
    """Return what a gate comes to by a policy or its text, and the verdicts."""
    policy = read_policy("p.toml", policy) if isinstance(policy, str) else policy
    verdicts = gate(policy, *files, today=today, **options).whole
    return outcome(verdicts), verdicts


LAYERS = tuple(
    f"model.layers.{i}.{name}.weight"
    for i in range(3)
    for name in ("self_attn.q_proj", "mlp.up_proj")
)
