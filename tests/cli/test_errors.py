"""Every error of usage or input ends with its exit code and one message, before anything is
written.
"""

import pytest

from tests.conftest import ROOT

pytestmark = pytest.mark.slow

SAMPLES = ROOT / "sample_checkpoints"
BASE, TUNED, R4, R16 = (SAMPLES / name for name in ("base", "full_ft", "lora_r4", "lora_r16"))
GRADIENTS, SPECTRUM = SAMPLES / "gradients", ROOT / "docs" / "examples" / "spectrum.jsonl"
STEPS = sorted(GRADIENTS.glob("*.safetensors"))

# Command line up to what is wrong -> (what is wrong, what the message names, exit code if it is not
# 2).
ERRORS = {
    (): [("--nope", "see loradiag --help"), ("magic", "magic")],
    ("spectrum", BASE, TUNED): [
        *((f"{words} -o r.jsonl", words.split()[0]) for words in (
            "--ranks 4,x", "--ranks 0", "--top 0", "--top many", "--svd magic", "--device tpu", "--layers (",
            "--exclude [", "--by planet", "--nope", "--rnak 4", f"--seed {'9' * 23} --top 4 "
                                                                 "--svd krylov",
        )),
        ("--ranks= -o r.jsonl", "--ranks"), ("--resume", "--resume"), ("--ranks", "--ranks"),
        ("c", "unexpected extra argument"), (f"--gradients {GRADIENTS}", "BASE alone"),
    ],
    ("spectrum", R4, BASE): [("-q", "not BASE")],
    ("spectrum", "--gradients"): [
        (f"{STEPS[0]} {STEPS[1]}", "repeat --gradients"), (f"{GRADIENTS} --alpha-is-rank", "--alpha-is-rank"),
        (f"{GRADIENTS} --recover", "--recover"),
    ],
    ("overlap", BASE, TUNED, GRADIENTS): [
        ("--rank 0 -o o.jsonl", "--rank"), ("--resume", "--resume"), (f"{STEPS[0]} -o o.jsonl", "is also in", 3),
        ("--layers nowhere -o o.jsonl", "--exclude leaves out", 4),
    ],
    ("interference", R4): [
        ("-q", "at least two updates"), (f"{R4}", "given twice"), ("nowhere", "nowhere", 3),
        (f"{R16} --weights 1", "1 weights for 2"), (f"{R16} --weights 1,x", "--weights"), (f"{R16} --resume", "-o"),
        (f"{R16} --density 2", "--density"), (f"{R16} --spectrum {R4}/adapter_config.json/u.jsonl", "cannot be written", 3),
    ],
    ("interference", BASE, TUNED): [("-q", "at least two updates")],
    ("interference", R4, BASE): [(f"{TUNED}", "BASE first")],
    ("intruders", BASE): [
        *((f"{TUNED} {words}", words.split()[0]) for words in ("--epsilon 1", "--window -1", "--directions 0")),
        (f"{TUNED} --resume", "-o"), ("nowhere", "nowhere", 3),
    ],
    ("intruders", R4): [(f"{BASE}", "not BASE")],
    ("residual", BASE, TUNED): [
        ("-q", "at least one ADAPTER"), (f"{TUNED}", "TUNED itself"), (f"{R4} --resume", "-o"),
        ("nowhere", "nowhere", 3), (f"{R4} --layers (", "not a valid regular expression"),
        (f"{R4} --layers lm_head", "no weight of the adapter can be measured", 4),
    ],
    ("residual", R4, TUNED): [(f"{R16}", "not BASE")],
    ("verify-merge", BASE): [
        (f"{TUNED} {R4}", "adapter"), (f"{R4} nowhere", "nowhere", 3),
        (f"{R4} {TUNED} --layers norm", "no adapted weight", 4), (f"{R4} {TUNED} --layers (", "--layers"),
        (f"{R4} {TUNED} --resume", "--resume"),
    ],
    ("fleet",): [("nowhere/**", "nowhere", 4)],
    ("plan", BASE): [
        ("--params million", "--params million"), ("--ranks x", "--ranks x"), ("--cost --top 0", "--top 0"),
    ],
    ("allocate", SPECTRUM): [
        ("--max-rank 4", "give exactly one of"), ("-o ranks.jsonl", "give exactly one of"),
        ("--params 1M --total-rank 3", "give exactly one of"), ("--params ten", "--params ten"),
        ("--params 100", "at least"), ("--params 50k --min-rank 6", "more than the budget"),
        ("--params 50k --allowed-ranks 8,x", "--allowed-ranks 8,x"),
        ("--params 50k --allowed-ranks 8 --max-rank 4", "--allowed-ranks"),
        ("--params 50k --layers zzz", "--layers zzz"), ("--memory-budget 2", "--memory-budget 2"),
        ("--memory-budget 2GB --optimizer lion", "--optimizer lion"), ("--energy 90", "--energy 90"),
        ("--params 50k --scaling 0 -o adapter_config.json", "--scaling 0"), ("--params 50k -o ranks.txt", ".jsonl"),
        (f"--params 50k --layer-weights {STEPS[0]}", "UTF-8", 3),
        ("--params 50k --check config.json", "--check"), ("--params 50k -o a.jsonl --check "
                                                          "config.json", "--check"),
    ],
    ("extract", BASE, TUNED, "-o", "adapter"): [
        ("-q", "exactly one option"), ("--rank 4 --signal", "exactly one option"), ("--rank 0", "from 1 up"),
        ("--energy 90", "fraction above 0"), ("--energy nan", "fraction above 0"), ("--params ten", "--params"),
        ("--rank 4 --split a", "use both, b"), ("--rank 4 --adapter-dtype int8", "use float32"),
        ("--rank 4 --unfactored keep", "--unfactored keep"), ("--allocation missing.json", "missing.json", 3),
        ("--rank 4 --layers nothing-here", "--exclude leaves out", 4),
    ],
    ("report", SPECTRUM): [
        ("-o r.pdf", "--format"), ("--format pdf", "pdf"), ("--format parquet", "give one with -o"),
        ("nothing.jsonl", "nothing.jsonl", 3),
    ],
    ("report",): [("-q", "RESULTS")],
    ("plot", SPECTRUM): [
        ("--figure overlap", "loradiag overlap BASE TUNED GRADIENTS"), ("--figure sweep", "loradiag probe sweep BASE"),
        ("--figure heatmap --field nope", "use one of fro, base_fro"), ("-o x.gif", ".png, .svg, .pdf"),
        ("--label a --label b", "2 labels for 1 results"), ("--layers nothing-at-all", "no layer left to draw", 4),
    ],
    ("probe", "truncation", BASE, TUNED): [
        (f"--eval {SPECTRUM} --ranks x", "x"), (f"--eval {SPECTRUM} --resume", "--resume"),
        ("--eval nowhere.txt", "nowhere.txt", 3),
    ],
}  # fmt: skip
CASES = [
    ((*command, *words.split()), named, *code)
    for command, cases in ERRORS.items()
    for words, named, *code in cases
]


@pytest.mark.parametrize(
    "case", CASES, ids=lambda case: " ".join(map(str, case[0])).replace(str(ROOT), "")
)
def test_error_is_one_message_with_exit_code(run, tmp_path, case):
    words, named, *code = case
    ran = run(*words)
    assert (ran.code, ran.out) == (code[0] if code else 2, ""), ran.err
    assert named in ran.err
    assert ran.err.startswith("Error: ")
    assert ran.err.count("\n") == 1
    assert list(tmp_path.iterdir()) == []
