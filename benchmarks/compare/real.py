"""What each tool says of a real fine-tune and a real adapter, its error against float64 NumPy, time
and memory.
"""

import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.torch import load_file

from benchmarks.compare import tools
from benchmarks.compare.inputs import Weights, best, error, fresh, singular, spread, weights_of
from benchmarks.measure import Used, in_turn, machine, multiple, print_table
from tests.oracles import effective_rank, energy_at, rank_at

NAMED = [f"model.layers.14.{part}_proj" for part in ("self_attn.q", "self_attn.k", "mlp.down")]
RANK = 8
Rows = Mapping[str, Mapping[str, Any]]
Figure = tuple[
    str, Callable[[Any], float], Callable[[np.ndarray], float]
]  # label, of a row, of singular values

C8: Figure = ("C(8)", lambda row: row["energy"]["8"], lambda s: energy_at(s, 8))
RANK90: Figure = ("rank at 90%", lambda row: row["rank_at"]["0.9"], lambda s: rank_at(s, 0.9))
ERROR: Figure = ("ε", lambda row: row["error"], lambda s: best(s, RANK))
TOP8: Figure = ("C(8)", lambda row: row["concentration_top_k"], lambda s: energy_at(s, 8))
ENTROPY: Figure = (
    "effective rank",
    lambda row: row["effective_rank"],
    lambda s: effective_rank(np.sqrt(s)),
)  # σ/Σσ
STABLE: Figure = (
    "stable rank",
    lambda row: row["stable_rank"],
    lambda s: float((s**2).sum() / s[0] ** 2),
)
ENERGY90: Figure = ("energy rank 90%", lambda row: row["energy_rank_90"], lambda s: rank_at(s, 0.9))
NORM: Figure = (
    "‖ΔW‖",
    lambda row: row.get("fro", row.get("delta_fro_norm")),
    lambda s: float(np.linalg.norm(s)),
)


@dataclass(frozen=True)
class Tool:
    """How a tool is run, which numbers of a layer and which verdict it gives; ``reference`` is the
    row of ratios.
    """

    run: Callable[[], tools.Ran]
    rows: Callable[[str], Rows]
    figures: tuple[Figure, ...]
    verdict: Callable[[str], str]
    reference: str
    adapter: bool = False


def real(base: Path, tuned: Path, adapter: Path, rounds: int = 1) -> None:
    """Run the tools in turn on one pair and one adapter, and print one table."""
    home = fresh("real")
    before, after = weights_of(base), weights_of(tuned)
    truth = {
        name: after[f"{name}.weight"].double() - before[f"{name}.weight"].double() for name in NAMED
    }
    del before, after
    spectra = {False: {n: singular(d) for n, d in truth.items()}}
    spectra[True] = {n: singular(d) for n, d in factored(adapter).items()}
    peers = make_tools(home, base, tuned, adapter, truth)
    texts = {}

    def measured(name: str) -> Used:
        ran = peers[name].run()
        tools.done(ran)
        texts[name] = ran.text
        (home / f"{name}.txt").write_text(f"{ran.used}\n{ran.text}")
        return ran.used

    used = in_turn({name: lambda name=name: measured(name) for name in peers}, rounds)
    print(f"{machine()}; runs in turn: {rounds}\n")
    rows = []
    for name, tool in peers.items():
        layers, taken, other = tool.rows(texts[name]), used[name], used[tool.reference]
        costs = [
            f"{taken.median('wall'):.0f}",
            f"{taken.median('cpu'):.1f}",
            f"{taken.median('peak_mib'):.0f}",
        ]
        ratios = [multiple(taken.of(what), other.of(what)) for what in ("wall", "cpu")]
        rows.append(
            (
                name,
                *says(layers, tool.figures, spectra[tool.adapter]),
                tool.verdict(texts[name]),
                *costs,
                *ratios,
            )
        )
    head = (
        "tool | q, k, down of block 14 | all blocks | largest relative error | verdict | wall s | "
        "processor s"
    )
    print_table(f"{head} | peak MiB | wall ÷ loradiag | processor ÷ loradiag", rows)


def says(
    rows: Rows, figures: tuple[Figure, ...], spectra: Mapping[str, np.ndarray]
) -> tuple[str, str, str]:
    """Return the figures of the named matrices, their range over the blocks, and their largest
    relative error.
    """
    named, spans, errors = [], [], []
    for label, of, true in figures:
        named.append(f"{label} {', '.join(f'{of(rows[name]):.3g}' for name in NAMED)}")
        spans.append(
            f"{label} {spread(of(row) for name, row in rows.items() if 'layers.' in name)}"
        )
        off = max(abs(of(rows[name]) / true(spectra[name]) - 1) for name in NAMED)
        errors.append(f"{label} {off:.0e}" if off else f"{label} 0")
    return "; ".join(named), "; ".join(spans) if len(rows) > len(NAMED) else "-", "; ".join(errors)


def factored(adapter: Path) -> Weights:
    """Return alpha/r · B · A of the named matrices in float64, from the files of a plain PEFT
    adapter.
    """
    tensors = load_file(adapter / "adapter_model.safetensors")
    config = json.loads((adapter / "adapter_config.json").read_text())
    assert not any(
        config.get(key) for key in ("use_rslora", "use_dora", "rank_pattern", "alpha_pattern")
    )
    scaling = config["lora_alpha"] / config["r"]
    pairs = {
        n: [tensors[f"base_model.model.{n}.lora_{side}.weight"].double() for side in "BA"]
        for n in NAMED
    }
    return {name: scaling * (b @ a) for name, (b, a) in pairs.items()}


def make_tools(
    home: Path, base: Path, tuned: Path, adapter: Path, truth: Weights
) -> dict[str, Tool]:
    """Return every tool with its options."""
    spectrum, small, extract = (
        "loradiag `spectrum`",
        "loradiag `spectrum ADAPTER`",
        "loradiag `extract --rank 8`",
    )

    def loradiag(file: str, *words: object) -> Callable[[], tools.Ran]:
        return lambda: (
            (home / file).unlink(missing_ok=True)
            or tools.loradiag("spectrum", *words, "-o", home / file)
        )

    def records(file: str) -> Callable[[str], Rows]:
        def read(text: str) -> Rows:
            lines = map(json.loads, (home / file).read_text().splitlines())
            return {
                x["layer"].removesuffix(".weight"): x for x in lines if x["record"] == "spectrum"
            }

        return read

    def errors(out: str) -> Callable[[str], Rows]:
        return lambda text: {
            n: {"error": error(delta, truth[n])} for n, delta in factored(home / out).items()
        }

    def watched(text: str) -> Rows:
        rows = next(json.loads(line) for line in text.splitlines() if line.startswith('[{"'))
        return {row["longname"]: row for row in rows}

    def warnings(text: str) -> str:
        found = [row["warning"] or "no warning" for row in watched(text).values()]
        return ", ".join(f"{word}: {found.count(word)}" for word in sorted(set(found)))

    def audit(text: str) -> dict[str, Any]:
        return dict(json.JSONDecoder().raw_decode(text[text.index("{") :])[0])

    def audited(text: str) -> Rows:
        return {
            row["name"].removeprefix("base_model.model."): row
            for row in audit(text)["layer_data"]["layer_rows"]
        }

    def suggested(text: str) -> str:
        return ", ".join(
            f"{n} {p['uniform_median']:g}"
            for n, p in audit(text)["policy_global_suggestions"].items()
        )

    def modules(text: str) -> Rows:
        return {
            x["name"].removesuffix(".weight"): x for x in report()["modules"] if x.get("has_svd")
        }

    def report() -> dict[str, Any]:
        return dict(json.loads((home / "m.json").read_text()))

    def gist(text: str) -> str:
        return "; ".join(x["title"] for x in report()["diagnostics"]["findings"])

    low = label("Low rank")
    return {
        spectrum: Tool(
            loradiag("s.jsonl", base, tuned), records("s.jsonl"), (C8, RANK90), low, spectrum
        ),
        "loradiag `spectrum --top 64`": Tool(
            loradiag("t.jsonl", base, tuned, "--top", 64), records("t.jsonl"), (C8,), low, spectrum
        ),
        "modeldelta `--top-k 8`": Tool(
            lambda: tools.modeldelta(base, tuned, home / "m.json", 8)[0],
            modules,
            (TOP8, ENTROPY),
            gist,
            spectrum,
        ),
        "WeightWatcher": Tool(
            lambda: tools.weightwatcher(base, tuned)[0], watched, (STABLE,), warnings, spectrum
        ),
        extract: Tool(
            lambda: tools.loradiag(
                "extract", base, tuned, "--rank", RANK, "-o", fresh("real/ours") / "adapter"
            ),
            errors("ours/adapter"),
            (ERROR,),
            label("Error"),
            extract,
        ),
        "mergekit-extract-lora `--max-rank 8`": Tool(
            lambda: tools.mergekit(base, tuned, fresh("real/mergekit") / "adapter", RANK),
            errors("mergekit/adapter"),
            (ERROR,),
            lambda text: "-",
            extract,
        ),
        small: Tool(
            loradiag("a.jsonl", adapter),
            records("a.jsonl"),
            (RANK90, NORM),
            label("Rank used"),
            small,
            adapter=True,
        ),
        "gradience `audit`": Tool(
            lambda: tools.audited(adapter),
            audited,
            (ENERGY90, NORM),
            suggested,
            small,
            adapter=True,
        ),
    }


def label(name: str) -> Callable[[str], str]:
    """Return a reader of one labelled statement of loradiag's summary."""

    def read(text: str) -> str:
        found = re.search(rf"^{name} +(.+(?:\n {{6,}}\S.*)*)", text, re.MULTILINE)
        return " ".join(found[1].split()) if found else "-"

    return read
