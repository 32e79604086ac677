"""Records made by hand, their numbers by NumPy; nothing here calls the package's own
mathematics.
"""

import math

import numpy as np

from lora_diag.decisions.allocate.record import Allocation, AllocationBaseline, Certificate
from lora_diag.decisions.merge.record import Merged, MergedLoss
from lora_diag.decisions.recover.record import Recovery
from lora_diag.diagnostics.checkpoints.record import CheckpointLayer
from lora_diag.diagnostics.fleet.record import Fleet, FleetLayer
from lora_diag.diagnostics.geometry.record import Geometry, Head, Movement
from lora_diag.diagnostics.geometry.record import GeometryBaseline as Null
from lora_diag.diagnostics.interference.record import EnergyOverlap, Interference, Union
from lora_diag.diagnostics.overlap.record import Overlap
from lora_diag.diagnostics.portability.record import Portability
from lora_diag.diagnostics.residual.record import Residual
from lora_diag.probes.curvature.record import Curvature, LossBound
from lora_diag.probes.fisher.record import Effect, Fisher
from lora_diag.probes.gain.record import Gain, GainLoss, LayerGain
from lora_diag.probes.intrinsic.record import Intrinsic
from lora_diag.probes.sensitivity.record import Sensitivity
from lora_diag.probes.strength.record import Strength, StrengthChoice
from lora_diag.records import Agreement, Probe
from lora_diag.tuning.record import Tune, TuneTrial
from tests import building
from tests.building import build, layer_spectrum

# The command of a kind of record, where they are not called the same.
COMMANDS = {"allocation": "allocate", "union": "interference", "fleet": "spectrum --adapters"}
COMMANDS |= {"checkpoint_layer": "checkpoints", "merged": "merge"}

MERGED = [("base", "models/base"), ("tuned", "runs/sql"), ("tuned", "runs/chat")]

TYPES = (
    "self_attn.q_proj",
    "self_attn.k_proj",
    "self_attn.v_proj",
    "self_attn.o_proj",
    "mlp.gate_proj",
    "mlp.up_proj",
    "mlp.down_proj",
)


def spectrum(
    layer, s, *, fro=None, complete=True, edge=0.0, signal=None, verdict="resolved", ranks=(8, 16)
):
    """Return the record of a layer with these singular values."""
    seen = {
        "noise_fro": 0.05,
        "edge": edge,
        "signal_rank": len(s) if signal is None else signal,
        "verdict": verdict,
    }
    some = {"rank_at": {"0.9": 3, "0.95": None, "0.99": None}, "effective_rank": None}
    return layer_spectrum(layer, s, ranks, fro=fro, complete=complete, resolution=seen, **some)


def decay(number, values=32):
    """Return a spectrum that no other layer has."""
    return (1 + 0.1 * number) * np.arange(1, values + 1.0) ** -(0.4 + 0.01 * (number % 50))


def model(blocks, types=TYPES, values=32, **more):
    """Return the spectra of a model of so many blocks."""
    return [
        spectrum(
            f"model.layers.{block}.{name}.weight", decay(block * len(types) + place, values), **more
        )
        for block in range(blocks)
        for place, name in enumerate(types)
    ]


def trained(blocks, types=TYPES, steps=(10, 250, 500, 750, 1000)):
    """Return the checkpoints of a run whose updates grow and whose directions come to rest."""
    result = []
    for place, layer in enumerate(layers_of(blocks, types)):
        for t, step in enumerate(steps):
            norms = {
                "fro": (1 + 0.1 * place) * (t + 1) ** 0.5,
                "increment": 1 / (t + 1),
                "spectral_share": 0.5 / (t + 1),
            }
            overlaps = tuple(0.9 ** (t - s) for s in range(t))
            result.append(
                build(
                    CheckpointLayer,
                    layer=layer,
                    step=step,
                    shape=(32, 64),
                    overlaps=overlaps,
                    **norms,
                )
            )
    return result


def merged(blocks, types=TYPES, updates=("runs/sql", "runs/chat")):
    """Return what a merge keeps of updates: less of the later ones, and less than nothing of some
    layers.
    """
    rng = np.random.default_rng(blocks)
    result = []
    for i, update in enumerate(updates):
        for layer in layers_of(blocks, types):
            kept = {
                "kept": rng.random() - 0.2 * i,
                "kept_mean": 0.5,
                "kept_random": 0.5 + 0.1 * rng.random(),
            }
            result.append(build(Merged, layer=layer, shape=(32, 64), update=update, **kept))
    return result


def judged(
    methods=("sum", "ties", "dare"), scales=(0.5, 1.0), sets=("sql", "chat", "other"), updates=2
):
    """Return the losses of merges on the text of each update and on one of none; the first merge
    was written.
    """
    counts, result = (10, 20, 30, 40), []
    merges = [(method, scale) for method in methods for scale in scales]
    for place, name in enumerate(sets):
        alone = [("alone", None)] if place < updates else []
        for number, model in enumerate([("base", None), *alone, *merges]):
            loss = 1.5 + 0.03 * number
            more = {"change": loss - 2, "change_error": 0.02, "chosen": model == merges[0]}
            more |= (
                {"update": f"runs/{name}", "gap": loss - 1.4, "gap_error": 0.01} if alone else {}
            )
            nll, (method, scale) = tuple(loss * count for count in counts), model
            result.append(
                build(MergedLoss, set=name, method=method, scale=scale, loss=loss, nll=nll, **more)
            )
    return result


def residual(layer, fro, other, cosine, epsilon_min, *, adapter="runs/lora_r8", rank=8, **more):
    """Return the record of an adapter whose distance follows from norms, an angle and a floor."""
    distances = {}
    if fro:
        epsilon = float(np.sqrt(fro**2 + other**2 - 2 * cosine * fro * other)) / fro
        excess = None if epsilon_min is None else epsilon**2 - epsilon_min**2
        distances = {
            "epsilon": epsilon,
            "epsilon_min": epsilon_min,
            "excess": excess,
            "norm_ratio": other / fro,
        }
        distances["limited_by"] = "direction" if other else "not adapted"
    if fro and other:
        scaled = {
            "best_scale": cosine * fro / other,
            "epsilon_best_scale": float(np.sqrt(1 - cosine**2)),
        }
        distances |= {"cosine": cosine, **scaled}
    norms = {"fro": fro, "adapter_fro": other, "base_fro": 10.0, "energy_error": 0.0}
    where = {"layer": layer, "shape": (32, 64), "adapter": adapter, "role": "adapter", "rank": rank}
    return build(Residual, **where | norms | distances | more)


def residuals(blocks, types=TYPES, adapter="runs/lora_r8"):
    rng = np.random.default_rng(len(adapter) + blocks)
    drawn = [
        (layer, 1 + rng.random(), 1 + rng.random(), rng.random())
        for layer in layers_of(blocks, types)
    ]
    return [residual(*norms, 0.2 + 0.5 * share, 0.5, adapter=adapter) for *norms, share in drawn]


def overlap(layer, step, rank, kappa, tangent):
    kappa_random, tangent_random = (
        rank / np.sqrt(32 * 64),
        float(np.sqrt(rank / 32 + rank / 64 - rank**2 / 2048)),
    )
    random = {"kappa_random": kappa_random, "tangent_random": tangent_random}
    return build(
        Overlap,
        layer=layer,
        shape=(32, 64),
        step=step,
        rank=rank,
        kappa=kappa,
        tangent=tangent,
        **random,
    )


def overlaps(blocks, types=TYPES, steps=(0, 40, 200), ranks=(4, 8)):
    rng = np.random.default_rng(blocks)
    return [
        overlap(layer, step, rank, 0.3 * rng.random(), 0.5 + 0.3 * rng.random())
        for layer in layers_of(blocks, types)
        for step in steps
        for rank in ranks
    ]


def allocations(blocks, types=TYPES):
    rng = np.random.default_rng(blocks)
    return [
        build(
            Allocation, layer=layer, shape=(32, 64), rank=int(rng.integers(0, 20)), uniform_rank=8
        )
        for layer in layers_of(blocks, types)
    ]


def geometries(blocks, types=TYPES):
    """Return the records of updates whose statistics differ from those of both baselines."""

    def moved(kind, low, angle, **more):
        angles = tuple(float(angle * i) for i in range(1, 9))
        shares = {
            "low_30": low,
            "principal_30": 0.6 - low,
            "left_angles": angles,
            "right_angles": angles[::-1],
        }
        return build(kind, **shares, **more)

    return [
        build(
            Geometry,
            layer=layer,
            k=8,
            heads=tuple(
                build(Head, kind="query", index=i, fro=0.1 + i, base_fro=10.0) for i in range(4)
            ),
            moved=moved(Movement, 0.5, 0.3),
            chance=moved(Null, 0.35, 0.2),
            rounding=moved(Null, 0.45, 0.1),
        )
        for layer in layers_of(blocks, types)
    ]


def layers_of(blocks, types=TYPES):
    return [f"model.layers.{block}.{name}.weight" for block in range(blocks) for name in types]


def recoveries(blocks, types=TYPES, ranks=(1, 4, 16)):
    """Updates of which half is seen before rounding, and their files."""
    shares = {str(r): min(1.0, 0.2 + 0.1 * k) for k, r in enumerate(ranks)}
    energies = {"energy": {r: share / 2 for r, share in shares.items()}, "energy_estimate": shares}
    energies["energy_interval"] = {
        r: (share * 0.8, min(1.0, share * 1.5)) for r, share in shares.items()
    }
    return [
        build(Recovery, layer=layer, shape=(32, 64), **energies)
        for layer in layers_of(blocks, types)
    ]


def certificate(spent=1000, kept=0.5, bound=0.51):
    uniform = AllocationBaseline(
        name="uniform r=8", spent=0.9 * spent, kept=0.9 * kept, equal=kept, epsilon_min=0.8
    )
    money = dict.fromkeys(("budget", "spent", "params"), spent)
    return build(
        Certificate,
        kept=kept,
        bound=bound,
        gap=(bound - kept) / bound,
        baselines=(uniform,),
        **money,
    )


def agreement(cosines, larger, dimension):
    """Return what principal angles with these cosines say, between spaces of as many and of
    ``larger`` dimensions.
    """
    cosines = tuple(sorted(map(float, cosines), reverse=True))
    return Agreement(
        cosines=cosines, overlap=float(np.mean(np.square(cosines))), random=larger / dimension
    )


def interference(layer, columns, rows, first="runs/sql", second="runs/chat", shape=(32, 64)):
    """Return a pair whose spaces have these cosines, by rank."""
    spaces = {
        "columns": {str(r): agreement(c, r, shape[0]) for r, c in columns.items()},
        "rows": {str(r): agreement(c, r, shape[1]) for r, c in rows.items()},
    }
    spaces["energy"] = {
        str(r): build(EnergyOverlap, first_in_second=0.3, second_in_first=0.2) for r in columns
    }
    pair = {"first": first, "second": second, "cosine": 0.1, "relation": "share"}
    return build(Interference, layer=layer, shape=shape, **pair, **spaces)


def interferences(blocks, types=TYPES, updates=("runs/sql", "runs/chat"), ranks=(4, 8)):
    rng = np.random.default_rng(blocks)
    return [
        interference(layer, *({r: rng.random(r) for r in ranks} for _ in range(2)), first, second)
        for layer in layers_of(blocks, types)
        for i, first in enumerate(updates)
        for second in updates[i + 1 :]
    ]


def union(layer, together, apart, every, updates=("runs/sql", "runs/chat")):
    """Return the sum of some updates by its rank at 90%, theirs, and that which keeps
    90% of each.
    """
    summed = spectrum(layer, decay(1))
    shares, number = ("0.9", "0.95", "0.99"), len(updates)
    several, none = number > 1, dict.fromkeys(shares)
    summed = summed.model_copy(update={"rank_at": dict.fromkeys(shares, together)})
    own = {
        "updates": updates,
        "ranks": (None,) * number,
        "fro": summed.fro,
        "parts_fro": (1.0,) * number,
    }
    own |= {
        "parts_rank_at": dict.fromkeys(shares, apart),
        "parts_effective_rank": 3.0,
        "additive": none,
    }
    if several:
        own["additive"] = none | {"0.9": together / apart if together and apart else None}
        own |= {"rank_for_all": none | {"0.9": every}, "weakest_kept": none | {"0.9": 0.7}}
        own |= {"additive_effective": 0.5, "energy_ratio": 1.1}
    return build(Union, layer=layer, shape=summed.shape, spectrum=summed, **own)


def unions(blocks, types=TYPES):
    rng = np.random.default_rng(blocks)
    return [
        union(layer, int(rng.integers(1, 20)), 20, int(rng.integers(20, 30)))
        for layer in layers_of(blocks, types)
    ]


def adapter(path, fro=1.0, used=0.8, *, dead=0, spike=0.3, rank=8, sketch=(1.0, 0.0)):
    """Return an adapter of ten layers that uses so much of its rank."""
    layers = {"model.layers.0.q_proj.weight": FleetLayer(fro=fro, rank=rank, rank_99=3, spike=0.3)}
    size = {
        "modules": 10,
        "dead": dead,
        "rank": rank,
        "fro": fro,
        "spike": spike if fro else None,
        "layers": layers,
    }
    size["total_rank_99"] = 40 if rank is None else round(10 * rank * used)
    size |= {} if rank is None else {"total_rank": 10 * rank, "used": used}
    return build(
        Fleet, adapter=path, kind="PEFT LoRA", update=tuple(sketch), space=tuple(sketch), **size
    )


def adapters(count, folder="runs"):
    """Return a fleet in which some stand out: dead, loud, spiked, over-ranked."""
    rng = np.random.default_rng(count)

    def plain(number):
        norm, used = float(rng.uniform(0.9, 1.1)), float(rng.uniform(0.6, 1))
        return adapter(f"{folder}/{number}/lora", norm, used, sketch=rng.normal(size=64))

    return [
        *map(plain, range(count)),
        adapter(f"{folder}/dead/lora", 0.0, 0.0, dead=10, sketch=np.zeros(64)),
        adapter(f"{folder}/loud/lora", 50.0, sketch=rng.normal(size=64)),
        adapter(f"{folder}/spiked/lora", 1.1, 0.3, spike=0.95, sketch=rng.normal(size=64)),
    ]


def served(
    blocks,
    types=TYPES,
    programs=(("peft", "0.21.2"), ("vllm", "0.33.0"), ("llamacpp", "0b03adaa632b")),
):
    """Return what programs make of a model's weights: exact, wrong by more in every block, dropped,
    refused.
    """
    result = []
    for place, layer in enumerate(layers_of(blocks, types)):
        block, second = place // len(types), ("wrong", "dropped", "full")[place % len(types) % 3]
        epsilons = {
            "exact": 0.0,
            "full": 0.0,
            "dropped": 1.0,
            "wrong": 0.5 * (block + 1),
            "refused": None,
        }
        for number, (consumer, version) in enumerate(programs):
            status = ("exact", second, "refused")[number % 3]
            how = {
                "consumer": consumer,
                "version": version,
                "status": status,
                "epsilon": epsilons[status],
            }
            result.append(build(Portability, layer=layer, part="factors", rank=8, **how))
    return result


def results(records, whole=(), name="tuned"):
    kind = records[0].record if records else "spectrum"
    sides = [("base", "models/base"), ("tuned", f"models/{name}")]
    return building.results(
        records, command=COMMANDS.get(kind, kind), inputs=sides, whole=tuple(whole), ranks=[8, 16]
    )


def probe(probe, subject, loss, *, name="held_out", shifted=False, **more):
    return Probe(
        probe=probe,
        set=name,
        shifted=shifted,
        subject=subject,
        tokens=5000,
        data="0" * 16,
        loss=loss,
        **more,
    )


def swept(ranks=(4, 8, 16, 64), seeds=3, sets=("held_out", "other"), base=1.8, rates=(1e-4, 1e-3)):
    """Return the records of a sweep: the higher rate is the better one, all seeds there and one
    elsewhere.
    """
    result = []
    for place, name in enumerate(sets):
        where = {"name": name, "shifted": place > 0}
        result.append(probe("sweep", "base", base + 0.1 * place, **where))
        for rank in ranks:
            for lr in rates:
                for seed in range(seeds if lr == max(rates) else 1):
                    noise = 0.0002 * ((rank + seed) % 3)
                    loss = 1.5 + 0.15 / rank + 0.004 * seed + noise + 0.05 * (lr < max(rates))
                    result.append(
                        probe("sweep", "lora", loss, rank=rank, lr=lr, seed=seed, **where)
                    )
    return result


def truncated(
    ranks=(0, 1, 4, 16, 64), sets=("held_out", "other"), base=2.0, tuned=1.2, error=0.02, **alone
):
    """Return the records of a truncation: with the rank the loss goes from BASE's to TUNED's."""
    result = []
    for place, name in enumerate(sets):
        where = {"name": name, "shifted": place > 0}
        ends = (base, tuned) if place == 0 else (tuned, base)
        for subject, loss in zip(("base", "tuned"), ends, strict=True):
            result.append(
                probe("truncation", subject, loss, gap=loss - ends[1], gap_error=error, **where)
            )
        for rank in ranks:
            kept = rank / (rank + 4)
            loss = ends[0] + kept * (ends[1] - ends[0])
            more = {
                "rank": rank,
                "gap": loss - ends[1],
                "gap_error": error * (1 - kept),
                "kept": kept,
            }
            result.append(
                probe("truncation", "truncated", loss, energy=kept**2, **more, **where, **alone)
            )
    return result


def alone(parts=("mlp.up_proj", "self_attn.q_proj"), ranks=(0, 4), kind="module_type", **more):
    """Return the records of parts truncated alone: the later costs more, and half as much at the
    higher rank.
    """
    result = truncated(ranks=(), **more)
    return result + [
        record.model_copy(update={kind: part, "gap": (0.1 + i) / (1 + j), "rank": rank})
        for i, part in enumerate(parts)
        for j, rank in enumerate(ranks)
        for record in truncated(ranks=(0,), **more)
        if record.subject == "truncated"
    ]


def said(adapters=("runs/r4", "runs/r16"), sets=("held_out", "other"), depths=5, base=0.8, **more):
    """Return the records of outputs: each adapter is worse than the one before it, and its states
    further away.
    """
    result = []
    for place, name in enumerate(sets):
        where = {"name": name, "shifted": place > 0}
        ends = (("base", base, 1.0), ("tuned", 0.0, 0.0))
        for subject, gap, far in ends:
            hidden = (None, *[far] * (depths - 1))
            result.append(
                probe(
                    "outputs", subject, 1.2 + gap, gap=gap, gap_error=0.02, hidden=hidden, **where
                )
            )
        for i, path in enumerate(adapters):
            hidden = (None, *[(1 + i) / (2 + depth) for depth in range(depths - 1)])
            gap = 0.05 * i - 0.02
            record = probe(
                "outputs", "adapter", 1.2 + gap, gap=gap, gap_error=0.01, hidden=hidden, **where
            )
            result.append(record.model_copy(update={"name": path} | more))
    return result


def scaled(scales=(0.0, 0.5, 1.0, 1.5), parts=(), sets=("held_out", "other")):
    """Return losses by strength: a parabola, best at 1 on the first set and at 0 on others; or of
    parts at 0.
    """
    counts, result = (10, 20, 30, 40), []
    for place, name in enumerate(sets):
        more = {"set": name, "shifted": place > 0}
        for part, scale in [*((None, t) for t in scales), *((part, 0.0) for part in parts)]:
            loss = 1.5 + (scale - (place == 0)) ** 2 if part is None else 1.6 + 0.1 * len(part)
            ends = {
                "gap": loss - 1.5 - (place > 0),
                "change": loss - 1.5 - (place == 0),
                "kept": 0.5,
            }
            nll = tuple(loss * count for count in counts)
            errors = dict.fromkeys(("loss_error", "gap_error", "change_error"), 0.01)
            result.append(
                build(
                    Strength, scale=scale, part=part, loss=loss, nll=nll, **ends, **errors, **more
                )
            )
        if place == 0 and not parts:
            more = {
                "best_gap_error": 0.0,
                "gain": 1.0,
                "gain_error": 0.01,
                "sufficient": 0.7,
                "low": 0.5,
                "high": 1.0,
            }
            more |= {"sufficient_low": 0.6, "sufficient_high": 0.8, "fit": "edge"}
            result.append(build(StrengthChoice, set=name, **more))
    return result


def adapted(units=("mlp.up_proj", "self_attn.q_proj"), sets=("held_out", "other")):
    """Return the records of units adapted alone, two rates each: the later gains more, and all at
    the higher rate.
    """
    rng = np.random.default_rng(0)
    counts = [10, 20, 30, 40]
    result = []
    for place, name in enumerate(sets):
        base = np.array(counts) * 2.0
        more = {"set": name, "shifted": place > 0}
        result.append(
            build(Sensitivity, loss=2.0, nll=tuple(base), predictions=tuple(counts), **more)
        )
        for i, unit in enumerate(units):
            for lr in (1e-4, 1e-3):
                nll = base - np.array(counts) * (0.1 + 0.2 * i) * (lr > 1e-4) - rng.normal(size=4)
                loss = float(nll.sum() / sum(counts))
                run = {
                    "unit": unit,
                    "layers": (unit,),
                    "rank": 8,
                    "params": 64,
                    "lr": lr,
                    "nll": tuple(nll),
                }
                result.append(
                    build(Sensitivity, loss=loss, gain=2.0 - loss, gain_error=0.1, **run, **more)
                )
    return result


SETTINGS = {
    "length": 32,
    "dtype": "float32",
    "device": "cpu",
    "tokens": "bytes",
    "batch": 8,
    "steps": 9,
    "seed": 0,
}
SETTINGS |= {
    "gain_tolerance": 0.02,
    "target_modules": "all-linear",
    "alpha_over_rank": 2,
    "optimizer": "AdamW",
    "untruncated": "tuned",
}


def probed(records, name="tuned", command="probe sweep", adapters=(), **settings):
    """Return a run that has these probe records."""
    sides = [
        ("base", "models/base"),
        ("tuned", f"models/{name}"),
        *(("adapter", path) for path in adapters),
    ]
    return building.results(
        (),
        command=command,
        inputs=[*sides, ("eval", "held_out.txt")],
        whole=tuple(records),
        **SETTINGS | settings,
    )


def curved(
    layers=("model.layers.0.mlp.up_proj.weight", "model.layers.1.mlp.up_proj.weight"), **how
):
    """Return the records of curvature at TUNED, or at BASE without ``ranks``; the gap is 1/(1 + r)
    nats.
    """
    ranks, sets = how.get("ranks", (0, 4, 16)), how.get("sets", ("held_out",))
    more = {"set": sets[0], "at": "tuned" if ranks else "base", "matrix": "hessian"}
    top = {"eigenvalues": (50.0, 2.0), "residual": 1e-3, "smallest": -1.0}
    result = [build(Curvature, layer=None, trace=9.0, trace_error=1.0, **top, **more)]
    for place, layer in enumerate(layers):
        own = {"eigenvalues": (2.0 + place,), "residual": 1e-3} if how.get("eigen", True) else {}
        result.append(build(Curvature, layer=layer, trace=float(place - 1), **own, **more))
    for name in sets:
        for rank in ranks:
            for along in (0.1, 1.0):
                gap = how.get("gap", 1.0) * along / (1 + rank)
                more = {
                    "linear": 0.1 * gap,
                    "quadratic": 0.8 * gap,
                    "upper": 100 / (1 + rank),
                    "holds": True,
                }
                more |= {"loss": 1 + gap, "gap": gap, "gap_error": 0.3 * abs(gap)}
                result.append(build(LossBound, set=name, rank=rank, along=along, **more))
    return result


def reached(dims=(10, 100, 1000), ranks=(1, 8), sets=("held_out", "shifted"), full=1.0):
    """Return the runs of ``probe intrinsic``, two seeds and rates each; ``shifted``
    gains nothing.
    """
    sizes = [("full", None, None, 10**6, full)]
    sizes += [("subspace", d, None, d, 2 - 0.3 * np.log10(d)) for d in dims]
    sizes += [("lora", None, r, 500 * r, 1.3 - 0.02 * r) for r in ranks]
    result = []
    for name in sets:
        more = {"set": name, "shifted": name == "shifted"}
        result.append(
            build(
                Intrinsic, subject="base", params=0, loss=2.0 if name != "shifted" else 0.5, **more
            )
        )
        for subject, dim, rank, params, loss in sizes:
            for lr, seed, worse in ((1e-3, 0, 0.0), (1e-2, 0, 0.2), (1e-3, 1, 0.04)):
                run = {
                    "subject": subject,
                    "dim": dim,
                    "rank": rank,
                    "params": params,
                    "lr": lr,
                    "seed": seed,
                }
                result.append(build(Intrinsic, loss=loss + worse, **run, **more))
    return result


def fishers(
    types=("mlp.up_proj", "self_attn.q_proj"), blocks=4, ranks=(4, 8), measured=True, values=32
):
    """Return the records of ``probe fisher``: the KL has the order of F, the other way round than
    σ².
    """
    result = []
    for place, kind in enumerate(types):
        for block in range(blocks):
            number = place * blocks + block + 1
            curve = tuple(float(number) * (1 - r / values) for r in range(values))
            at = {str(r): curve[r] for r in ranks}
            effect = {
                r: Effect(loss=1.0, gap=f / 2, gap_error=None, kl=f / 2) for r, f in at.items()
            }
            more = {
                "linear": at,
                "weight": {r: -f for r, f in at.items()},
                "data": at,
                "kfac": at,
                "fisher": curve,
            }
            more |= {"on": "held_out", "effect": effect} if measured else {}
            layer = f"model.layers.{block}.{kind}.weight"
            result.append(build(Fisher, layer=layer, shape=(8, 8 * number), **more))
    return result


def gained(types=TYPES, blocks=4, values=6):
    """Return the records of ``probe gain``: a_i of each layer fall like 1, 1/2, …, its σ all alike;
    the measured gain is somewhat above the attributed one.
    """
    result, total = [], 0.0
    for place, kind in enumerate(types):
        for block in range(blocks):
            size = 0.01 * (place + 1) * (block + 1)
            parts = tuple(size / number for number in range(1, values + 1))
            layer = f"model.layers.{block}.{kind}.weight"
            more = {"sigma": (1.0 + place,) * values, "directions": parts, "gain": sum(parts)}
            more |= {"fro": (1.0 + place) * values**0.5, "shifted": False, "set": "text"}
            result.append(build(LayerGain, layer=layer, shape=(8, 8), **more))
            total += sum(parts)
    nll = tuple(10.0 + i % 2 for i in range(16))
    more = {"base_nll": nll, "tuned_nll": tuple(value - total for value in nll), "set": "text"}
    more |= {"predictions": (1,) * 16, "gain_error": 0.001, "shifted": False}
    result.append(build(Gain, gain=total, **more))
    for amount, kept in ((1, 0.2), (8, 0.6), (32, 0.92)):
        more = {"set": "end", "shifted": False, "kept": kept, "kept_error": 0.02, "sequences": 100}
        result.append(build(GainLoss, subject="directions", amount=amount, **more))
    return result


def searched(ranks=(4, 16, 64), sets=("held_out", "other"), base=1.8):
    """Return the run of a search that chose the middle rank; more parameters lose less."""
    records = []
    for name in sets:
        more = {"set": name, "shifted": name != sets[0]}
        records.append(build(TuneTrial, variant="base", params=0, loss=base, **more))
        for rank in ranks:
            for seed in range(3):
                loss = base - 0.2 * math.log2(rank) + 0.01 * seed
                run = {"variant": f"uniform-r{rank}", "params": 1000 * rank, "seed": seed}
                records.append(build(TuneTrial, lr=1e-3, loss=loss, **run, **more))
    rank = ranks[len(ranks) // 2]
    records.append(
        build(Tune, set=sets[0], variant=f"uniform-r{rank}", rank=rank, params=1000 * rank, seeds=3)
    )
    return probed(records, command="tune")


def example(name):
    """Return results that the figure of this name can draw."""
    records = {
        "residual": residuals,
        "overlap": overlaps,
        "allocation": allocations,
        "recovery": recoveries,
        "angles": interferences,
        "union": unions,
        "portability": served,
        "checkpoints": trained,
        "merge": merged,
        **dict.fromkeys(("geometry", "rotation", "heads"), geometries),
    }
    probes = {
        "sweep": swept,
        "truncation": truncated,
        "alone": alone,
        "strength": scaled,
        "outputs": said,
        "depth": said,
        "sensitivity": adapted,
        "curvature": curved,
        "intrinsic": reached,
        "fisher": fishers,
        "gain": gained,
    }
    if name == "tune":
        return searched()
    if name == "merged":
        return building.results(merged(1), command="merge", inputs=MERGED, whole=judged())
    if name in probes:
        return probed(probes[name]())
    return results(adapters(9) if name == "fleet" else records.get(name, model)(2))
