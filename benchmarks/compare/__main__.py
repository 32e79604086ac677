"""Output of each tool for the same planted inputs, and its correctness; as Markdown.

    python -m benchmarks.compare [PARTS] [--kohya SD_SCRIPTS]
    python -m benchmarks.compare real BASE TUNED ADAPTER

Tools from the package index are installed in ``.bench/peers``, each in an environment of its own.
kohya's scripts are no package: they run from a checkout that you name, with its requirements
installed in ``.bench/peers/kohya``; without it their rows are left out. Needs transformers and peft
(``pip install -e '.[train]'``). docs/comparison.md has the results.
"""

import argparse
import json
import sys
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch

from benchmarks.compare import tools
from benchmarks.compare.inputs import (
    EFFECTIVE_FOUR,
    LOW_RANK,
    POWER_LAW,
    RANK,
    Weights,
    about,
    best,
    error,
    excess,
    fresh,
    kohya_name,
    make_adapter,
    make_pair,
    planted,
    singular,
    spoil,
    spread,
    stored,
    worst,
)
from benchmarks.compare.real import real as compare_real
from benchmarks.measure import print_table
from tests.oracles import energy_at, rank_at


def floor(kohya: Path | None) -> None:
    """A rank-16 update in a bf16 pair, above and below the rounding floor."""
    for rms in (1e-3, 1e-5):
        home = fresh(f"floor{rms:g}")
        truth = make_pair(home, "llama", planted(LOW_RANK, rms), torch.bfloat16)
        files = stored(home)
        shares = spread(error(files[name], update) for name, update in truth.items())
        ranks = spread(rank_at(singular(update), 0.9) for update in files.values())
        overlap = spread(subspace(files[name], update) for name, update in truth.items())
        print(
            f"rms {rms:g} on weights of rms 0.02; planted: rank 16, "
            f"{rank_at(LOW_RANK.numpy(), 0.9)} at 90%."
        )
        print(
            f"In the files: ‖rounding‖/‖planted‖ {shares}; rank at 90% {ranks}; share of the "
            "planted left"
        )
        print(f"subspace in the 16 largest left vectors {overlap}.\n")
        measured(home, truth)
        extracted(home, truth, kohya)


def subspace(found: torch.Tensor, truth: torch.Tensor) -> float:
    """Return ‖U_16ᵀ Û_16‖_F²/16: the overlap of two spaces of left singular vectors."""
    u, v = np.linalg.svd(found.numpy())[0][:, :RANK], np.linalg.svd(truth.numpy())[0][:, :RANK]
    return float(((u.T @ v) ** 2).sum() / RANK)


def measured(home: Path, truth: Weights) -> None:
    base, tuned = home / "base", home / "tuned"
    ours = about(tools.loradiag_records("spectrum", base, tuned), "layer", truth)
    deltas = about(tools.modeldelta(base, tuned, home / "m.json")[1], "name", truth)
    watched = about(tools.weightwatcher(base, tuned)[1], "longname", truth)
    square = [w for w in watched if w["M"] == w["N"]]
    oblong = [w for w in watched if w["M"] != w["N"]]
    resolution = [record["resolution"] for record in ours]
    rows = [
        ("loradiag: verdict", ", ".join(sorted({r["verdict"] for r in resolution}))),
        ("loradiag: signal rank", spread(r["signal_rank"] for r in resolution)),
        (
            "loradiag: rank at 90%, records only",
            spread(record["rank_at"]["0.9"] for record in ours),
        ),
        ("modeldelta: effective rank", spread(m["effective_rank"] for m in deltas)),
        ("modeldelta: energy of the 16 largest", spread(m["concentration_top_k"] for m in deltas)),
        ("WeightWatcher: spikes, square matrices", spread(w["num_spikes"] for w in square)),
        ("WeightWatcher: spikes, 2:1 matrices", spread(w["num_spikes"] for w in oblong)),
        ("WeightWatcher: stable rank", spread(w["stable_rank"] for w in watched)),
        ("WeightWatcher: warning", ", ".join(sorted({w["warning"] or "none" for w in watched}))),
    ]
    print_table("tool and figure | all layers", rows)


def extracted(home: Path, truth: Weights, kohya: Path | None) -> None:
    base, tuned = home / "base", home / "tuned"
    rows = []
    for choice in (["--rank", RANK], ["--signal"]):
        out = home / f"ours{choice[0]}"
        ran = tools.loradiag("extract", base, tuned, *choice, "-o", out)
        says = next(
            (line for line in ran.text.splitlines() if line.startswith("Resolution")), ran.last
        )
        rows.append(
            (
                f"loradiag {choice[0]}",
                "nothing written" if ran.code else f"{distance(base, out, truth):.3f}",
                says,
            )
        )
    tools.done(tools.mergekit(base, tuned, home / "mergekit", RANK))
    rows.append(("mergekit --max-rank 16", f"{distance(base, home / 'mergekit', truth):.3f}", "-"))
    if kohya:
        tools.done(tools.kohya_extract(kohya, base, tuned, home / "k.safetensors", RANK))
        result = tools.kohya_updates(home / "k.safetensors", truth)
        rows.append(("kohya flux_extract --dim 16", f"{worst(result, truth):.3f}", "-"))
    print_table("adapter by | error against what was planted | says", rows)


def distance(base: Path, adapter: Path, truth: Weights) -> float:
    return worst(tools.merged(base, adapter), truth)


def decay(kohya: Path | None) -> None:
    """A full-rank update with σ_i ∝ i^−0.7: figures, and adapters against the
    Eckart-Young optimum.
    """
    home = fresh("decay")
    make_pair(home, "llama", planted(POWER_LAW, 1e-3), torch.float32)
    truth = stored(home)
    spectra = {name: singular(update) for name, update in truth.items()}
    for r in (8, 16, 64):
        print(f"C({r}) = {spread(energy_at(s, r) for s in spectra.values())}; ", end="")
    print(f"rank at 90% {spread(rank_at(s, 0.9) for s in spectra.values())}\n")
    figures(home, spectra)
    make_adapter(home / "whole", truth, max(len(s) for s in spectra.values()), 512)
    print_table("rank 16 by | error ÷ optimum − 1", fixed(home, truth, spectra, kohya))
    print_table(
        "rank for 90% of the energy by | less the true one", automatic(home, spectra, kohya)
    )
    print_table("rank 16 from a bf16 pair by | error ÷ optimum − 1", half())


def figures(home: Path, spectra: Mapping[str, np.ndarray]) -> None:
    """Compare measured values with float64."""
    base, tuned = home / "base", home / "tuned"
    ranks = (8, 16, 64)
    ours = about(
        tools.loradiag_records("spectrum", base, tuned, "--ranks", "8,16,64"), "layer", spectra
    )
    curve = [
        abs(x["energy"][str(r)] - energy_at(spectra[x["layer"]], r)) for x in ours for r in ranks
    ]
    deltas = {
        r: about(tools.modeldelta(base, tuned, home / "m.json", r)[1], "name", spectra)
        for r in ranks
    }
    shares = [
        abs(m["concentration_top_k"] - energy_at(spectra[m["name"]], r))
        for r in ranks
        for m in deltas[r]
    ]
    watched = about(tools.weightwatcher(base, tuned)[1], "longname", spectra)
    energies = {w["longname"]: spectra[f"{w['longname']}.weight"] ** 2 for w in watched}
    stable = [
        abs(w["stable_rank"] * energies[w["longname"]][0] / energies[w["longname"]].sum() - 1)
        for w in watched
    ]
    rows = [
        ("loradiag spectrum: C(8), C(16), C(64)", f"{max(curve):.0e}"),
        ("modeldelta --top-k 8, 16, 64: concentration", f"{max(shares):.0e}"),
        ("WeightWatcher: stable rank, relatively (no C(r))", f"{max(stable):.0e}"),
    ]
    print_table("figure | largest error", rows)


def fixed(
    home: Path, truth: Weights, spectra: Mapping[str, np.ndarray], kohya: Path | None
) -> list[tuple[str, str]]:
    """Extract rank 16 with every tool; those that take no pair get the update as an adapter of full
    rank.
    """
    base, tuned, whole = home / "base", home / "tuned", home / "whole"
    for method in ("auto", "exact"):
        out = home / f"ours-{method}"
        tools.done(
            tools.loradiag("extract", base, tuned, "--rank", RANK, "--svd", method, "-o", out)
        )
    tools.done(tools.mergekit(base, tuned, home / "mergekit", RANK))
    tools.peft_convert(base, whole, home / "peft", RANK)
    result = {
        "loradiag extract": tools.merged(base, home / "ours-auto"),
        "loradiag extract --svd exact": tools.merged(base, home / "ours-exact"),
        "mergekit": tools.merged(base, home / "mergekit"),
        "PEFT save_as_lora, from an adapter of full rank": tools.merged(base, home / "peft"),
    }
    for dtype, name in (("fp16", "fp16, the default"), ("fp32", "fp32")):
        out = home / f"gradience-{dtype}"
        tools.done(tools.gradience_truncate(whole, out, RANK, "--dtype", dtype))
        result[f"gradience truncate, {name}, from the same"] = tools.merged(base, out)
    if kohya:
        file = home / "k.safetensors"
        tools.done(tools.kohya_extract(kohya, base, tuned, file, RANK))
        result["kohya flux_extract"] = tools.kohya_updates(file, truth)
        tools.done(tools.kohya_extract(kohya, base, tuned, file, RANK, "--clamp_quantile", "1"))
        result["kohya flux_extract --clamp_quantile 1"] = tools.kohya_updates(file, truth)
        tools.done(tools.kohya_resize(kohya, whole.with_suffix(".kohya.safetensors"), file, RANK))
        result["kohya resize, from an adapter of full rank"] = tools.kohya_updates(file, truth)
    return [(name, excess(update, truth, spectra)) for name, update in result.items()]


def automatic(
    home: Path, spectra: Mapping[str, np.ndarray], kohya: Path | None
) -> list[tuple[str, str]]:
    """Ask for 90% of the energy, in each tool's own words."""
    base, tuned, whole = home / "base", home / "tuned", home / "whole"
    tools.done(tools.loradiag("extract", base, tuned, "--energy", "0.9", "-o", home / "ours90"))
    tools.peft_convert(base, whole, home / "peft90", 0.9)
    layers = tools.gradience_audit(whole)["layer_data"]["layer_rows"]
    prefix = "base_model.model."
    result = {
        "loradiag extract --energy 0.9": tools.peft_ranks(home / "ours90", spectra),
        "PEFT save_as_lora(rank=0.9)": tools.peft_ranks(home / "peft90", spectra),
        "gradience audit, energy rank": {
            f"{row['name'].removeprefix(prefix)}.weight": int(row["energy_rank_90"])
            for row in layers
        },
    }
    if kohya:
        words = ["--dynamic_method", "sv_fro", "--dynamic_param", 0.9**0.5]
        file = home / "k90.safetensors"
        tools.done(
            tools.kohya_resize(kohya, whole.with_suffix(".kohya.safetensors"), file, 512, *words)
        )
        result["kohya resize sv_fro 0.9487 (√0.9)"] = tools.kohya_ranks(file, spectra)
    return [
        (name, spread(ranks[n] - rank_at(s, 0.9) for n, s in spectra.items()))
        for name, ranks in result.items()
    ]


def half() -> list[tuple[str, str]]:
    """Extract the same update from a bf16 pair; the optimum is that for what the files hold."""
    home = fresh("decay-bf16")
    base, tuned = home / "base", home / "tuned"
    make_pair(home, "llama", planted(POWER_LAW, 1e-3), torch.bfloat16)
    truth = stored(home)
    spectra = {name: singular(update) for name, update in truth.items()}
    tools.done(tools.loradiag("extract", base, tuned, "--rank", RANK, "-o", home / "ours"))
    tools.done(
        tools.loradiag(
            "extract", base, tuned, "--rank", RANK, "--dtype", "bfloat16", "-o", home / "ours16"
        )
    )
    tools.done(tools.mergekit(base, tuned, home / "mergekit", RANK))
    return [
        ("loradiag extract", excess(tools.merged(base, home / "ours"), truth, spectra)),
        (
            "loradiag extract --dtype bfloat16",
            excess(tools.merged(base, home / "ours16"), truth, spectra),
        ),
        (
            "mergekit, factors in the files' bf16",
            excess(tools.merged(base, home / "mergekit"), truth, spectra),
        ),
    ]


Row = tuple[str, str, str, str]


def adapters(kohya: Path | None) -> None:
    """An adapter of rank 16 that uses 4 of its directions, alpha 32, plain and rsLoRA."""
    home = fresh("adapters")
    truth = make_pair(home, "llama", planted(EFFECTIVE_FOUR, 1e-3), torch.float32)
    for name, rslora in (("plain", False), ("rslora", True)):
        adapter = home / name
        make_adapter(adapter, truth, 16, 32, rslora)
        print(f"{'rsLoRA, scaling 32/√16 = 8' if rslora else 'scaling 32/16 = 2'}\n")
        rows = [
            ours(home, adapter, truth),
            gradience(home, adapter, truth),
            peft(home, adapter, truth),
        ]
        if kohya and not rslora:
            rows += resized(kohya, adapter, truth)
        rows.append(("truth", "4", "1", f"{max(best(singular(t), 4) for t in truth.values()):.4f}"))
        print_table("tool | rank | its ‖ΔW‖ ÷ the true one | error of its smaller adapter", rows)


def ours(home: Path, adapter: Path, truth: Weights) -> Row:
    records = tools.loradiag_records("spectrum", adapter)
    norms = {name.removesuffix(".weight"): float(torch.linalg.norm(t)) for name, t in truth.items()}
    ratio = spread(
        record["fro"] / norms[record["layer"].removesuffix(".weight")] for record in records
    )
    ranks = ", ".join(
        spread(record["rank_at"][share] for record in records) for share in ("0.9", "0.95", "0.99")
    )
    out = home / f"ours-{adapter.name}"
    tools.done(tools.loradiag("extract", home / "base", adapter, "--energy", "0.99", "-o", out))
    error = f"{worst(tools.merged(home / 'base', out), truth):.4f}"
    return "loradiag spectrum; extract --energy 0.99", f"{ranks} at 90, 95, 99%", ratio, error


def gradience(home: Path, adapter: Path, truth: Weights) -> Row:
    audit = tools.gradience_audit(adapter)
    ranks = {
        name: f"{policy['uniform_median']:g}"
        for name, policy in audit["policy_global_suggestions"].items()
    }
    norms = {
        f"base_model.model.{n.removesuffix('.weight')}": float(torch.linalg.norm(t))
        for n, t in truth.items()
    }
    ratio = spread(
        row["delta_fro_norm"] / norms[row["name"]] for row in audit["layer_data"]["layer_rows"]
    )
    out = home / f"gradience-{adapter.name}"
    tools.done(tools.gradience_truncate(adapter, out, 4))
    error = f"{worst(tools.merged(home / 'base', out), truth):.4f}"
    return (
        "gradience audit; truncate --rank 4",
        ", ".join(f"{n} {r}" for n, r in ranks.items()),
        ratio,
        error,
    )


def peft(home: Path, adapter: Path, truth: Weights) -> Row:
    out = home / f"peft-{adapter.name}"
    tools.peft_convert(home / "base", adapter, out, 0.99)
    error = f"{worst(tools.merged(home / 'base', out), truth):.4f}"
    return "PEFT save_as_lora(rank=0.99)", spread(tools.peft_ranks(out, truth).values()), "-", error


def resized(kohya: Path, adapter: Path, truth: Weights) -> list[Row]:
    rows = []
    for method, value in (("sv_fro", 0.995), ("sv_ratio", 100), ("sv_cumulative", 0.99)):
        out = adapter.with_suffix(".resized.safetensors")
        words = ["--dynamic_method", method, "--dynamic_param", value]
        tools.done(
            tools.kohya_resize(kohya, adapter.with_suffix(".kohya.safetensors"), out, 16, *words)
        )
        error = f"{worst(tools.kohya_updates(out, truth), truth):.4f}"
        rows.append(
            (
                f"kohya resize {method} {value}",
                spread(tools.kohya_ranks(out, truth).values()),
                "-",
                error,
            )
        )
    return rows


VICTIM = "model.layers.0.self_attn.q_proj.weight"
CONVERT = """
import sys
from pathlib import Path
from benchmarks.compare.tools import peft_convert
peft_convert(Path(sys.argv[1]), Path(sys.argv[2]), Path(sys.argv[3]), 4)
"""


def damaged(kohya: Path | None) -> None:
    """An adapter with one NaN in one lora_B; one whose lora_B has a column less than its lora_A has
    rows.
    """
    for what in ("nan", "shape"):
        home = fresh(f"damaged-{what}")
        truth = make_pair(home, "llama", planted(EFFECTIVE_FOUR, 1e-3), torch.float32)
        base, adapter, flat = home / "base", home / "adapter", home / "adapter.kohya.safetensors"
        make_adapter(adapter, truth, 16, 32)
        module = VICTIM.removesuffix(".weight")
        spoil(
            adapter / "adapter_model.safetensors",
            f"base_model.model.{module}.lora_B.weight",
            what,
            1,
        )
        spoil(flat, f"{kohya_name(VICTIM)}.lora_up.weight", what, 1)
        out = {name: home / name for name in ("ours", "gradience", "peft", "kohya.safetensors")}
        extract = tools.loradiag("extract", base, adapter, "--rank", 4, "-o", out["ours"])
        runs = {
            "loradiag spectrum": (tools.loradiag("spectrum", adapter), "-"),
            "loradiag extract": written(extract, out["ours"]),
            "gradience audit": (tools.audited(adapter), "-"),
            "gradience truncate": written(
                tools.gradience_truncate(adapter, out["gradience"], 4), out["gradience"]
            ),
        }
        convert = tools.run([sys.executable, "-c", CONVERT, base, adapter, out["peft"]])
        runs["PEFT save_as_lora"] = written(convert, out["peft"])
        if kohya:
            file = out["kohya.safetensors"]
            runs["kohya resize"] = written(tools.kohya_resize(kohya, flat, file, 4), file)
        print_failures(home, f"{what} in lora_B of {module}, one of {len(truth)}", "q_proj", runs)


def broken(kohya: Path | None) -> None:
    """One NaN in one weight; one weight with a row less."""
    for what in ("nan", "shape"):
        home = fresh(f"broken-{what}")
        base, tuned = home / "base", home / "tuned"
        truth = make_pair(home, "llama", planted(LOW_RANK, 1e-3), torch.float32)
        spoil(tuned / "model.safetensors", VICTIM, what)
        delta, deltas = tools.modeldelta(base, tuned, home / "m.json")
        watch, watched = tools.weightwatcher(base, tuned)
        ours = about(tools.loradiag_records("spectrum", base, tuned), "layer", truth)
        extract, merge = home / "ours", home / "mergekit"
        runs = {
            "loradiag spectrum": (
                tools.loradiag("spectrum", base, tuned),
                f"figures of {len(ours)}",
            ),
            "loradiag extract": written(
                tools.loradiag("extract", base, tuned, "--rank", RANK, "-o", extract), extract
            ),
            "modeldelta": (delta, f"figures of {len(about(deltas, 'name', truth))}"),
            "WeightWatcher": (watch, f"figures of {len(about(watched, 'longname', truth))}"),
            "mergekit": written(tools.mergekit(base, tuned, merge, RANK), merge),
        }
        if kohya:
            file = home / "k.safetensors"
            runs["kohya flux_extract"] = written(
                tools.kohya_extract(kohya, base, tuned, file, RANK), file
            )
        print_failures(
            home, f"{what} in {VICTIM}, one of {len(truth)} weights that moved", VICTIM, runs
        )


def written(ran: tools.Ran, out: Path) -> tuple[tools.Ran, str]:
    """Return what ran, and whether it left an adapter."""
    return ran, "an adapter" if out.is_file() or any(out.rglob("*.safetensors")) else "nothing"


def print_failures(
    home: Path, title: str, weight: str, runs: dict[str, tuple[tools.Ran, str]]
) -> None:
    """Print exit codes, whether a line names the weight and its problem, what is left, and the last
    line.
    """
    words = ("nan", "shape", "size", "finite", "skip")
    name = weight.removesuffix(".weight")
    rows = []
    for tool, (ran, left) in runs.items():
        (home / f"{tool}.txt").write_text(ran.text)
        named = any(
            name in line and any(word in line.lower() for word in words)
            for line in ran.text.splitlines()
        )
        rows.append((tool, ran.code, "yes" if named else "no", left, ran.last[:120]))
    print(f"\n{title}")
    print_table("tool | exit code | names the weight in a message | leaves | last line", rows)


def layouts(kohya: Path | None) -> None:
    """GPT-2's Conv1D, tied embeddings, experts one by one in the file and fused; each matrix moved
    by rank 16.
    """
    for family in ("gpt2", "llama-tied", "mixtral", "gpt_oss"):
        home = fresh(f"layout-{family}")
        make_pair(
            home, family, planted(LOW_RANK, 1e-3), torch.float32, embeddings=family == "llama-tied"
        )
        names = sorted(stored(home))
        print(f"{family}, {len(names)} weights of two or three dimensions moved\n")
        print_table("tool | result", [*extracted_layout(home, family), *seen(home, names)])


def extracted_layout(home: Path, family: str) -> list[tuple[str, str]]:
    base, tuned, truth = home / "base", home / "tuned", tools.moved(home)
    ran = tools.loradiag("extract", base, tuned, "--rank", RANK, "-o", home / "ours")
    rows = [("loradiag extract", applied(ran, base, home / "ours", truth))]
    for more in ([], ["--embed-lora"]) if family == "llama-tied" else ([],):
        out = home / "-".join(["mergekit", *more])
        ran = tools.mergekit(base, tuned, out, RANK, *more)
        rows.append((" ".join(["mergekit", *more]), applied(ran, base, out, truth)))
    if family == "gpt2":
        make_conv1d_adapter(home / "adapter", truth)
        tools.peft_convert(base, home / "adapter", home / "peft", RANK)
        rows.append(
            (
                "PEFT save_as_lora, of an adapter",
                applied(tools.Ran(0, ""), base, home / "peft", truth),
            )
        )
    return rows


def applied(ran: tools.Ran, base: Path, adapter: Path, truth: Weights) -> str:
    """Say how far the base with the adapter merged in is from the fine-tune."""
    if ran.code:
        return f"exit {ran.code}: {ran.last}"
    result = tools.merged(base, adapter)
    errors = {name: error(result[name], update) for name, update in truth.items()}
    off = [f"{name} {value:.2f}" for name, value in errors.items() if value > 1e-3]
    return (
        f"merged, error {max(errors.values()):.0e} at most"
        if not off
        else f"merged, error of {', '.join(off)}"
    )


def make_conv1d_adapter(folder: Path, truth: Weights) -> None:
    """Write a PEFT adapter of rank 16 for GPT-2's Conv1D, whose weights are stored (in, out)."""
    make_adapter(folder, {name: update.T for name, update in truth.items()}, RANK, RANK)
    file = folder / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"fan_in_fan_out": True}))


def seen(home: Path, names: list[str]) -> list[tuple[str, str]]:
    """Say how many of the weights that moved tools have figures of, and which."""
    base, tuned = home / "base", home / "tuned"
    records = tools.loradiag_records("spectrum", base, tuned)
    ours = [
        record for record in records if record["layer"].partition("[")[0] in names and record["fro"]
    ]
    deltas = about(tools.modeldelta(base, tuned, home / "m.json")[1], "name", names)
    watched = about(tools.weightwatcher(base, tuned)[1], "longname", names)
    count = len(names)
    covered = len({record["layer"].partition("[")[0] for record in ours})
    ranks = {
        "loradiag spectrum": (
            covered,
            f"signal rank {spread(r['resolution']['signal_rank'] for r in ours)}",
        ),
        "modeldelta": (
            len(deltas),
            f"effective rank {spread(m['effective_rank'] for m in deltas)}",
        ),
        "WeightWatcher": (len(watched), f"spikes {spread(w['num_spikes'] for w in watched)}"),
    }
    return [
        (name, f"figures of {result} of {count}; {figure}")
        for name, (result, figure) in ranks.items()
    ]


PARTS = {part.__name__: part for part in (floor, decay, adapters, damaged, layouts, broken)}

if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    real = sys.argv[1:2] == ["real"]
    if real:
        parser.add_argument("real", help="one table of a real language model and adapter")
        for side in ("base", "tuned", "adapter"):
            parser.add_argument(side, type=Path)
    else:
        parser.add_argument("parts", nargs="*", choices=[*PARTS, []], default=list(PARTS))
    parser.add_argument("--kohya", type=Path, help="a checkout of sd-scripts")
    chosen = parser.parse_args()
    names = (
        "mergekit",
        "modeldelta",
        "weightwatcher",
        "gradience",
        "peft",
        "transformers",
        "torch",
    )
    print(", ".join(f"{name} {tools.version(name)}" for name in names))
    if real:
        compare_real(chosen.base, chosen.tuned, chosen.adapter)
    for part in () if real else chosen.parts:
        print(f"\n### {PARTS[part].__doc__}\n", flush=True)
        PARTS[part](chosen.kohya.absolute() if chosen.kohya else None)
