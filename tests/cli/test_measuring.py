"""What all commands that measure samples have in common: table, records, resume, a gate, and
errors.
"""

import pytest

from tests.conftest import ROOT

pytestmark = pytest.mark.slow

BASE, TUNED, R4, R16 = (
    ROOT / "sample_checkpoints" / name for name in ("base", "full_ft", "lora_r4", "lora_r16")
)
ONE = "--layers", r"layers\.0\.(mlp\.up|self_attn\.q)"

GRADIENTS = ROOT / "sample_checkpoints" / "gradients"

# Command -> its arguments, and rules on its records with the exit code of a gate; layers left out
# are inconclusive.
COMMANDS = {
    "spectrum": ((BASE, TUNED, *ONE), {"relative <= 1": 5, "relative <= 1e-9": 1}),
    "residual": ((BASE, TUNED, R4, *ONE), {"epsilon <= 9": 5, "epsilon <= 1e-9": 1}),
    "intruders": (
        (BASE, R4),
        {"intruders <= 10": 0, "intruders <= 2": 1, "median intruders.share <= 0.9": 0},
    ),
    "overlap": ((BASE, TUNED, GRADIENTS, *ONE), {"kappa <= 0.999": 5, "kappa <= 1e-9": 1}),
    "spectrum --gradients": ((GRADIENTS, *ONE), {"energy.64 >= 0.5": 5, "energy.4 >= 1": 1}),
    "fleet": ((R4, R16), {"dead <= 0": 0, "used <= 0.5": 1}),
    "interference": (
        (R4, R16),
        {
            "cosine >= 0": 0,
            "cosine >= 0.9": 1,
            "relation != cancel": 0,
            "merges.ties_dense.residual <= 0.9": 0,
            "recompressed.8 <= 0.1": 1,
            "union.spectrum.rank_at.0.9 <= 64": 0,
            "columns.8.overlap <= 0.9": 0,
        },
    ),
}


@pytest.mark.parametrize("command", COMMANDS)
def test_table_records_and_gate_agree(run, tmp_path, command):
    words, rules = COMMANDS[command]
    ran = run(*command.split(), *words, "-o", "r.jsonl", width=80)
    assert ran.code == 0, ran.err
    assert max(map(len, ran.out.splitlines())) <= 80
    assert run("inspect", "r.jsonl", width=80).out == ran.out[: ran.out.index("\nNext ")] + "\n"
    assert run("inspect", "r.jsonl", "--by", "layer").code == 0
    assert run(*command.split(), *words, "--json").out == (tmp_path / "r.jsonl").read_text()
    for rule, code in rules.items():
        (tmp_path / "p.toml").write_text(f'[[rule]]\nname = "r"\nrequire = "{rule}"\n')
        judged = run("gate", "p.toml", "r.jsonl")
        assert judged.code == code, rule + judged.out + judged.err


@pytest.mark.parametrize("command", COMMANDS)
def test_interrupted_run_is_resumed(run, tmp_path, command):
    words = (*command.split(), *COMMANDS[command][0], "-o", "r.jsonl", "-q")
    assert run(*words).code == 0
    text = (tmp_path / "r.jsonl").read_text()
    lines = text.splitlines(keepends=True)
    for kept in {2, len(lines) - 2}:
        (tmp_path / "r.jsonl").write_text("".join(lines[:kept]) + lines[kept][:9])
        assert run(*words).code == 2
        assert run(*words, "--resume").code == 0
        assert (tmp_path / "r.jsonl").read_text() == text
