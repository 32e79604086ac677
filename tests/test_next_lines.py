"""Every next command that is printed below results runs as it is printed."""

import re
import shlex

import pytest

from tests.served import ROOT

pytestmark = pytest.mark.slow

SAMPLES = ROOT / "sample_checkpoints"
EVAL = "--eval held_out.txt --shifted shifted.txt --length 64"

# Bytes of a text: 12 sequences of 256 tokens, more of fewer.
SHORT = 12 * 256

# Where a user's own path stands in a suggested command, and what the test has for it.
FILES = {
    "base": SAMPLES / "base",
    "BASE": SAMPLES / "base",
    "full": SAMPLES / "full_ft",
    "lora": SAMPLES / "lora_r4",
    "other": SAMPLES / "lora_r16",
    "run": SAMPLES / "run",
    "gradients": SAMPLES / "gradients",
}
TEXTS = {
    "held_out.txt": "in_domain.txt",
    "text.txt": "shifted.txt",
    "shifted.txt": "shifted.txt",
    "TEXT": "in_domain.txt",
    "TRAIN_TEXT": "in_domain.txt",
    "train.txt": "in_domain.txt",
    "earlier_data.txt": "shifted.txt",
}

# Commands from which the next ones are followed to the end.
STARTS = (
    "spectrum base full",
    "spectrum base full -o s.jsonl",
    "spectrum base lora",
    "spectrum lora",
    f"checkpoints base run {EVAL} -o ck.jsonl",
    "checkpoints base run",
    "interference base lora other",
    "fleet lora other",
    "overlap base lora gradients",
    "residual base full lora other",
    "intruders base lora",
    "geometry base lora",
    "plan base",
    "plan-merge base lora --to bf16",
    "plan-merge base lora --to q8_0",
    "recover base full",
    "extract base full --rank 2 -o extracted/",
    "merge base lora other -o m/",
    "merge base lora --checkpoint -o merged1/",
    "portability lora",
    "portability base lora -o p.jsonl",
    "portability lora --consumers mlx",
    f"probe outputs base lora other {EVAL}",
    f"probe outputs base full lora {EVAL} -o o.jsonl",
    f"probe strength base lora {EVAL} -o t.jsonl",
    f"probe truncation base full {EVAL} --ranks 1,4",
    "probe fisher base full --data held_out.txt --length 64 -o f.jsonl",
    "probe gain base lora --data held_out.txt --shifted shifted.txt --length 64 --nodes 3",
    "probe gain base lora --data held_out.txt --eval held_out.txt --length 32 -o g.jsonl",
    "lint base run/checkpoint-100",
)

# How far a chain is followed, and the codes of a check that ends otherwise than done.
DEPTH = 6
JUDGES = {"gate": {0, 1}, "lint": {0, 1}, "verify-merge": {0}}

# Commands that train take minutes: they are only read.
TRAINS = {"tune", "probe sweep"}


def next_of(printed: str) -> list[str]:
    match = re.search(r"^ *Next +loradiag (.+?)   \(", printed, re.M)
    return shlex.split(match[1]) if match else []


@pytest.mark.parametrize("start", STARTS)
def test_next_commands_run_as_printed(loradiag, tmp_path, start):
    for name, path in FILES.items():
        (tmp_path / name).symlink_to(path)
    for name, text in TEXTS.items():
        (tmp_path / name).write_bytes((SAMPLES / "eval" / text).read_bytes()[:SHORT])
    if "fisher" in start:
        assert loradiag("spectrum", "base", "full", "-o", "SPECTRUM.jsonl", "-q").code == 0
    words = start.split()
    seen = []
    while words and words not in seen and len(seen) < DEPTH:
        seen.append(words)
        if " ".join(words[:2]) in TRAINS or words[0] in TRAINS:
            words = [*words, "--help"]
        ran = loradiag(*words, env={"COLUMNS": "1000"}, brief=True)
        assert ran.code in JUDGES.get(words[0], {0}), (seen, ran.err)
        words = next_of(ran.out)
