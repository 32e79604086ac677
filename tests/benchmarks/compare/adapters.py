"""What tools make of adapters of a smaller rank than they have, of other layouts of weights, and of damaged files."""

import json
import sys
from pathlib import Path

import torch

from tests.benchmarks.compare import tools
from tests.benchmarks.compare.inputs import (
    EFFECTIVE_FOUR,
    LOW_RANK,
    RANK,
    Weights,
    about,
    best,
    error,
    fresh,
    kohya_name,
    make_adapter,
    make_pair,
    planted,
    singular,
    spoil,
    spread,
    stored,
    table,
    worst,
)

Row = tuple[str, str, str, str]


def adapters(kohya: Path | None) -> None:
    """An adapter of rank 16 that uses 4 of its directions, alpha 32, plain and rsLoRA."""
    home = fresh("adapters")
    truth = make_pair(home, "llama", planted(EFFECTIVE_FOUR, 1e-3), torch.float32)
    for name, rslora in (("plain", False), ("rslora", True)):
        adapter = home / name
        make_adapter(adapter, truth, 16, 32, rslora)
        print(f"{'rsLoRA, scaling 32/√16 = 8' if rslora else 'scaling 32/16 = 2'}\n")
        rows = [ours(home, adapter, truth), gradience(home, adapter, truth), peft(home, adapter, truth)]
        if kohya and not rslora:
            rows += resized(kohya, adapter, truth)
        rows.append(("truth", "4", "1", f"{max(best(singular(t), 4) for t in truth.values()):.4f}"))
        table("tool | rank | its ‖ΔW‖ ÷ the true one | error of its smaller adapter", rows)


def ours(home: Path, adapter: Path, truth: Weights) -> Row:
    records = tools.loradiag_records("spectrum", adapter)
    norms = {name.removesuffix(".weight"): float(torch.linalg.norm(t)) for name, t in truth.items()}
    ratio = spread(record["fro"] / norms[record["layer"].removesuffix(".weight")] for record in records)
    ranks = ", ".join(spread(record["rank_at"][share] for record in records) for share in ("0.9", "0.95", "0.99"))
    out = home / f"ours-{adapter.name}"
    tools.done(tools.loradiag("extract", home / "base", adapter, "--energy", "0.99", "-o", out))
    error = f"{worst(tools.merged(home / 'base', out), truth):.4f}"
    return "loradiag spectrum; extract --energy 0.99", f"{ranks} at 90, 95, 99%", ratio, error


def gradience(home: Path, adapter: Path, truth: Weights) -> Row:
    audit = tools.gradience_audit(adapter)
    ranks = {name: f"{policy['uniform_median']:g}" for name, policy in audit["policy_global_suggestions"].items()}
    norms = {f"base_model.model.{n.removesuffix('.weight')}": float(torch.linalg.norm(t)) for n, t in truth.items()}
    ratio = spread(row["delta_fro_norm"] / norms[row["name"]] for row in audit["layer_data"]["layer_rows"])
    out = home / f"gradience-{adapter.name}"
    tools.done(tools.gradience_truncate(adapter, out, 4))
    error = f"{worst(tools.merged(home / 'base', out), truth):.4f}"
    return "gradience audit; truncate --rank 4", ", ".join(f"{n} {r}" for n, r in ranks.items()), ratio, error


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
        tools.done(tools.kohya_resize(kohya, adapter.with_suffix(".kohya.safetensors"), out, 16, *words))
        error = f"{worst(tools.kohya_updates(out, truth), truth):.4f}"
        rows.append((f"kohya resize {method} {value}", spread(tools.kohya_ranks(out, truth).values()), "-", error))
    return rows


VICTIM = "model.layers.0.self_attn.q_proj.weight"
CONVERT = """
import sys
from pathlib import Path
from tests.benchmarks.compare.tools import peft_convert
peft_convert(Path(sys.argv[1]), Path(sys.argv[2]), Path(sys.argv[3]), 4)
"""


def damaged(kohya: Path | None) -> None:
    """An adapter with one NaN in one lora_B; one whose lora_B has a column less than its lora_A has rows."""
    for what in ("nan", "shape"):
        home = fresh(f"damaged-{what}")
        truth = make_pair(home, "llama", planted(EFFECTIVE_FOUR, 1e-3), torch.float32)
        base, adapter, flat = home / "base", home / "adapter", home / "adapter.kohya.safetensors"
        make_adapter(adapter, truth, 16, 32)
        module = VICTIM.removesuffix(".weight")
        spoil(adapter / "adapter_model.safetensors", f"base_model.model.{module}.lora_B.weight", what, 1)
        spoil(flat, f"{kohya_name(VICTIM)}.lora_up.weight", what, 1)
        out = {name: home / name for name in ("ours", "gradience", "peft", "kohya.safetensors")}
        runs = {
            "loradiag spectrum": (tools.loradiag("spectrum", adapter), None),
            "loradiag extract": (tools.loradiag("extract", base, adapter, "--rank", 4, "-o", out["ours"]), "ours"),
            "gradience audit": (tools.audited(adapter), None),
            "gradience truncate": (tools.gradience_truncate(adapter, out["gradience"], 4), "gradience"),
            "PEFT save_as_lora": (tools.run([sys.executable, "-c", CONVERT, base, adapter, out["peft"]]), "peft"),
        }
        if kohya:
            file = out["kohya.safetensors"]
            runs["kohya resize"] = tools.kohya_resize(kohya, flat, file, 4), "kohya.safetensors"
        print(f"{what} in lora_B of {module}, one of {len(truth)}\n")
        rows = []
        for name, (ran, folder) in runs.items():
            (home / f"{name}.txt").write_text(ran.text)
            left = "-" if not folder else "an adapter" if any(out[folder].rglob("*.safetensors")) else "nothing"
            left = "an adapter" if folder and out[folder].is_file() else left
            rows.append((name, ran.code, "yes" if "q_proj" in ran.text else "no", left, ran.last[:120]))
        table("tool | exit code | prints the name | leaves | last line", rows)


def layouts(kohya: Path | None) -> None:
    """GPT-2's Conv1D, tied embeddings, experts one by one in the file and fused; each matrix moved by rank 16."""
    for family in ("gpt2", "llama-tied", "mixtral", "gpt_oss"):
        home = fresh(f"layout-{family}")
        make_pair(home, family, planted(LOW_RANK, 1e-3), torch.float32, embeddings=family == "llama-tied")
        names = sorted(stored(home))
        print(f"{family}, {len(names)} weights of two or three dimensions moved\n")
        table("tool | result", [*extracted(home, family), *seen(home, names)])


def extracted(home: Path, family: str) -> list[tuple[str, str]]:
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
        rows.append(("PEFT save_as_lora, of an adapter", applied(tools.Ran(0, ""), base, home / "peft", truth)))
    return rows


def applied(ran: tools.Ran, base: Path, adapter: Path, truth: Weights) -> str:
    """Say how far the base with the adapter merged in is from the fine-tune."""
    if ran.code:
        return f"exit {ran.code}: {ran.last}"
    result = tools.merged(base, adapter)
    errors = {name: error(result[name], update) for name, update in truth.items()}
    off = [f"{name} {value:.2f}" for name, value in errors.items() if value > 1e-3]
    return f"merged, error {max(errors.values()):.0e} at most" if not off else f"merged, error of {', '.join(off)}"


def make_conv1d_adapter(folder: Path, truth: Weights) -> None:
    """Write a PEFT adapter of rank 16 for GPT-2's Conv1D, whose weights are stored (in, out)."""
    make_adapter(folder, {name: update.T for name, update in truth.items()}, RANK, RANK)
    file = folder / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"fan_in_fan_out": True}))


def seen(home: Path, names: list[str]) -> list[tuple[str, str]]:
    """Say how many of the weights that moved tools have figures of, and which."""
    base, tuned = home / "base", home / "tuned"
    records = tools.loradiag_records("spectrum", base, tuned)
    ours = [record for record in records if record["layer"].partition("[")[0] in names and record["fro"]]
    deltas = about(tools.modeldelta(base, tuned, home / "m.json")[1], "name", names)
    watched = about(tools.weightwatcher(base, tuned)[1], "longname", names)
    count = len(names)
    covered = len({record["layer"].partition("[")[0] for record in ours})
    ranks = {
        "loradiag spectrum": (covered, f"signal rank {spread(r['resolution']['signal_rank'] for r in ours)}"),
        "modeldelta": (len(deltas), f"effective rank {spread(m['effective_rank'] for m in deltas)}"),
        "WeightWatcher": (len(watched), f"spikes {spread(w['num_spikes'] for w in watched)}"),
    }
    return [(name, f"figures of {result} of {count}; {figure}") for name, (result, figure) in ranks.items()]


def broken(kohya: Path | None) -> None:
    """One NaN in one weight; one weight with a row less."""
    for what in ("nan", "shape"):
        home = fresh(f"broken-{what}")
        base, tuned = home / "base", home / "tuned"
        truth = make_pair(home, "llama", planted(LOW_RANK, 1e-3), torch.float32)
        spoil(tuned / "model.safetensors", VICTIM, what)
        delta, deltas = tools.modeldelta(base, tuned, home / "m.json")
        watch, watched = tools.weightwatcher(base, tuned)
        extract = tools.loradiag("extract", base, tuned, "--rank", RANK, "-o", home / "ours")
        ours = about(tools.loradiag_records("spectrum", base, tuned), "layer", truth)
        merge = tools.mergekit(base, tuned, home / "mergekit", RANK)
        runs = [
            ("loradiag spectrum", tools.loradiag("spectrum", base, tuned), f"figures of {len(ours)}"),
            ("loradiag extract", extract, wrote(home / "ours" / "adapter_model.safetensors")),
            ("modeldelta", delta, f"figures of {len(about(deltas, 'name', truth))}"),
            ("WeightWatcher", watch, f"figures of {len(about(watched, 'longname', truth))}"),
            ("mergekit", merge, wrote(home / "mergekit" / "adapter_model.safetensors")),
        ]
        if kohya:
            file = home / "k.safetensors"
            runs.append(("kohya flux_extract", tools.kohya_extract(kohya, base, tuned, file, RANK), wrote(file)))
        print(f"{what} in {VICTIM}, one of {len(truth)} weights that moved\n")
        for name, ran, _ in runs:
            (home / f"{name}.txt").write_text(ran.text)
        name = VICTIM.removesuffix(".weight")
        head = "tool | exit code | names the weight in a message | leaves | last line"
        rows = ((tool, r.code, "yes" if complains(r, name) else "no", left, r.last[:120]) for tool, r, left in runs)
        table(head, rows)


def complains(ran: tools.Ran, name: str) -> bool:
    """Return whether a line names the weight and its problem."""
    words = ("nan", "shape", "size", "finite", "skip")
    return any(name in line and any(word in line.lower() for word in words) for line in ran.text.splitlines())


def wrote(file: Path) -> str:
    return "an adapter" if file.exists() else "nothing"
