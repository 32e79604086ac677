"""What all probes have in common: an interrupted run is resumed, and bad options are refused before
any work.
"""

import math
import re

import pytest

import lora_diag
from lora_diag.catalog import read_results, table
from lora_diag.cli.app import commands
from lora_diag.errors import InputError, NothingComparedError, UsageError
from lora_diag.running import probing
from tests.messages import raises_naming
from tests.probes.making import gpt2, moved, some_text

pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning")


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    """Models and texts by the names of the arguments of probes."""
    folder = tmp_path_factory.mktemp("inputs")
    base = gpt2(folder / "base")
    return {
        "base": base,
        "tuned": moved(base, folder / "tuned"),
        "adapters": [moved(base, folder / "other", seed=3)],
        "data": some_text(folder, "train", windows=5),
        "eval": [
            some_text(folder, "held", windows=2, source="shifted"),
            some_text(folder, "second", windows=2),
        ],
    }


# Probe -> its inputs, the number of evaluation sets, and options for a short run.
TRAINING = {"steps": 2, "widen": 0, "seed": 5}
PROBES = {
    "truncation": ("base tuned eval", 2, {"ranks": (0, 2)}),
    "outputs": ("base tuned adapters eval", 2, {}),
    "strength": ("base tuned eval", 2, {"scales": (0.3, 0.6, 0.9, 1.2)}),
    "sweep": ("base data eval", 1, {"ranks": (1, 2), "lr": (1e-2,), "repeats": 1, **TRAINING}),
    "sensitivity": ("base data eval", 1, {"rank": 1, "lr": (1e-2,), "layers": "h.1.attn", **TRAINING}),
    "intrinsic": (
        "base data eval", 1,
        {"dims": (5,), "lr": (3e-3,), "full_lr": (3e-3,), "ranks": (1,), "lora_lr": (1e-2,), **TRAINING},
    ),
    "curvature": ("base tuned eval", 1, {"layers": "h.0.attn.c_proj", "ranks": (0, 4), "eigenvalues": 1, "trace_vectors": 1}),
    "fisher": ("base tuned data eval", 1, {"ranks": (2, 4), "layers": "h.0."}),
}  # fmt: skip


def measure(probe, inputs, **more):
    names, sets, options = PROBES[probe]
    given = {name: inputs[name] for name in names.split()}
    given["eval"] = given["eval"][:sets]
    return getattr(lora_diag, f"probe_{probe}")(**given | options | more)


@pytest.mark.parametrize("probe", PROBES)
def test_interrupted_probe_resumes_behind_its_records(inputs, tmp_path, probe):
    """By Ctrl-C before the last records; the file is that of a whole run, and what it had is not
    measured again.
    """
    whole, cut, steps, seen, again, notes = (
        tmp_path / "whole.jsonl",
        tmp_path / "cut.jsonl",
        [],
        [],
        [],
        [],
    )
    result = measure(probe, inputs, output=whole, on_progress=steps.append)

    def stop(record):
        seen.append(record)  # the first is that of the run
        if len(seen) == len(result.whole) - 1:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        measure(probe, inputs, output=cut, on_record=stop)
    assert 0 < len(read_results(cut).whole) < len(result.whole)
    with pytest.raises(UsageError, match="resume"):
        measure(probe, inputs, output=cut)
    with pytest.raises(UsageError, match=r"settings \(.*length"):
        measure(probe, inputs, output=cut, resume=True, length=16)
    measure(probe, inputs, output=cut, resume=True, on_progress=again.append, on_note=notes.append)
    assert cut.read_text() == whole.read_text()
    assert len(again) < len(steps) or probe == "fisher"
    assert all(event.done <= event.total for event in (*steps, *again))
    assert notes[0].startswith("about ")
    again.clear()
    assert (
        measure(probe, inputs, output=cut, resume=True, on_progress=again.append).whole
        == result.whole
    )
    assert again == []


REFUSED = {
    "truncation": [
        ({"ranks": (-1,)}, r"ranks=\(-1,\)"), ({"by": "planet"}, "by='planet'"),
        ({"untruncated": "none"}, "untruncated='none'"),
        ({"batch": 0}, "batch=0"), ({"length": 1000}, "length=1000.*32 positions"), ({"dtype": "int8"}, "dtype='int8'"),
        ({"tokenizer": "nowhere"}, "nowhere: transformers cannot open a tokenizer.*tokenizer bytes", InputError),
        ({"eval": []}, "eval"), ({"eval": ["missing.txt"]}, r"missing\.txt: no such file", InputError),
        ({"layers": "nothing"}, "no matrix outside embeddings and head is selected", NothingComparedError),
        ({"layers": "("}, "layers"),
    ],
    "sweep": [
        ({"ranks": (0,)}, r"ranks=\(0,\)"), ({"lr": (0.0,)}, "lr=0"), ({"lr": (math.nan,)}, "lr=nan"),
        ({"lr": (10.0,)}, "lr=10"), ({"lr": ()}, "lr"), ({"seed": 2**31}, "seed=2147483648"),
        ({"steps": 0}, "steps=0"), ({"repeats": 0}, "repeats=0"), ({"seed": -1}, "seed=-1"), ({"widen": -1}, "widen=-1"),
        ({"gain_tolerance": 1.0}, "gain_tolerance=1"), ({"full_lr": ()}, "full_lr"),
        ({"quantized": "fp4"}, "quantized='fp4': unknown value; use nf4, int8"),
        ({"full": True, "dtype": "bfloat16"}, "rounds away most steps of full"),
        ({"target_modules": ("no_such_layer",)}, "target_modules: PEFT cannot adapt", InputError),
    ],
    "sensitivity": [
        ({"rank": 0}, "rank=0"), ({"delta": 0}, "delta=0"),
        ({"by": "head"}, "by='head': unknown value; use layer, block, type"),
        ({"layers": "no_such_layer"}, "no linear layer is selected", NothingComparedError),
    ],
    "intrinsic": [
        ({"dims": (0,)}, "dims=0"), ({"dims": (10**6,)}, "dims=1000000: the model has only"),
        ({"dims": (6,), "projection": "said"}, "dims=6: projection said trains 6 scales"),
        ({"projection": "other"}, "projection='other'"), ({"lr": (math.nan,)}, "lr=nan"),
        ({"full_lr": ()}, "full_lr"), ({"lora_lr": (-1.0,)}, "lora_lr=-1"), ({"share": 1.0}, "share=1"),
        ({"dtype": "bfloat16"}, "dtype='bfloat16': rounds away most steps"),
    ],
    "curvature": [
        ({"ranks": (-1,)}, r"ranks=\(-1,\)"), ({"along": (1.5,)}, r"along=\(1.5,\)"),
        ({"along": (math.nan,)}, r"along=\(nan,\)"),
        ({"eigenvalues": 0}, "eigenvalues=0"), ({"trace_vectors": 0}, "trace_vectors=0"),
        ({"by": "type"}, "by='type'"), ({"seed": -1}, "seed=-1"),
        ({"dtype": "bfloat16"}, "dtype='bfloat16': Hessian-vector products have errors"),
        ({"layers": "no_such_layer"}, "no matrix", NothingComparedError),
        ({"eval": ["a", "b"]}, "no such file", InputError),
        ({"eigenvalues": 0, "tuned": None}, "eigenvalues=0"),
    ],
    "fisher": [
        ({"labels": "mine"}, "labels"), ({"ranks": (-1,)}, "ranks"), ({"data": "none.txt"}, "no such file", InputError),
        ({"layers": "nothing"}, "", NothingComparedError),
    ],
    "outputs": [
        ({"adapters": (), "tuned": None}, "one ADAPTER"),
        ({"tuned": None, "reference": "x"}, "reference.*tuned"),
    ],
}  # fmt: skip


@pytest.mark.parametrize(
    ("probe", "case"),
    [(probe, case) for probe, cases in REFUSED.items() for case in cases],
    ids=str,
)
def test_invalid_option_of_probe_is_refused(inputs, tmp_path, probe, case):
    change, message, *error = case
    with pytest.raises(error[0] if error else UsageError, match=re.compile(message, re.IGNORECASE)):
        measure(probe, inputs, output=tmp_path / "r.jsonl", **change)
    assert not (tmp_path / "r.jsonl").exists()


COMMANDS = {
    "curvature": "{base} {tuned} --eval {held} --layers query|c_attn --ranks 0,4 --eigenvalues 1 "
    "--trace-vectors 2",
    "fisher": "{base} {tuned} --data {data} --measure --ranks 2,8 --batch 4",
    "intrinsic": "{base} --data {data} --eval {held} --dims 10 --ranks= --steps 2 --lr 1e-3 "
    "--full-lr 1e-2 --repeats 1"
    " --projection said",
}


@pytest.mark.parametrize("probe", COMMANDS)
def test_probe_command_writes_records(inputs, loradiag, tmp_path, probe):
    words = COMMANDS[probe].format(held=inputs["eval"][0], **inputs).split()
    ran = loradiag("probe", probe, *words, "-o", "r.jsonl")
    assert ran.code == 0, ran.err
    assert read_results(tmp_path / "r.jsonl").end is not None
    assert loradiag("inspect", "r.jsonl", "--by", "layer").code == 0


def test_texts_and_models_given_twice_are_refused(inputs):
    text, base, tuned = inputs["eval"][0], inputs["base"], inputs["tuned"]
    for probe in ("curvature", "fisher"):
        with pytest.raises(UsageError, match="give one file"):
            measure(probe, inputs, eval=[text, text])
    with raises_naming(UsageError, "evaluation", "held"):
        measure("truncation", inputs, shifted=[text])
    with raises_naming(UsageError, "training text"):
        measure("sweep", inputs, data=text)
    with pytest.raises(UsageError, match="TUNED itself"):
        lora_diag.probe_outputs(base, tuned, [tuned], eval=[text])


# Probe -> options of a run that a small amount of work reduces, and the options that do the same.
REDUCED = {
    "truncation": ({}, {"max_sequences": 8}),
    "outputs": ({}, {"max_sequences": 8}),
    "strength": ({"scales": (0.5,)}, {"max_sequences": 8}),
    "fisher": ({"layers": "h.0.attn"}, {"max_sequences": 8, "ranks": (8,)}),
    "intrinsic": (
        {"dims": (5,), "ranks": (1,), "steps": 2, "batch": 4},
        {
            "max_sequences": 8,
            "repeats": 1,
            "widen": 0,
            "lr": (3e-3,),
            "full_lr": (3e-4,),
            "lora_lr": (3e-3,),
        },
    ),
    "curvature": (
        {"layers": "h.0.attn.c_proj", "along": (0.5,)},
        {"max_sequences": 8, "eigenvalues": 1, "trace_vectors": 5, "ranks": (1, 4, 16, 64)},
    ),
}


@pytest.mark.parametrize("probe", REDUCED)
def test_run_with_defaults_is_reduced_to_amount_of_work(inputs, tmp_path, monkeypatch, probe):
    """As if the options were given, on evenly spaced sequences; what is given is not reduced."""
    monkeypatch.setattr(probing, "CPU_WORK", 1)
    options, smaller = REDUCED[probe]
    given = {name: inputs[name] for name in PROBES[probe][0].split()} | options
    given["eval"], run = (
        [some_text(tmp_path, "held", windows=19)],
        getattr(lora_diag, f"probe_{probe}"),
    )
    reduced, explicit = run(**given), run(**given, **smaller)
    assert (reduced.whole, reduced.layers) == (explicit.whole, explicit.layers)
    assert len(reduced.run.settings["reduced"]) == len(smaller)
    assert "--max-sequences 8 (of 19)" in reduced.run.settings["reduced"]
    assert ["Reduced" in table(found, 80) for found in (reduced, explicit)] == [True, False]
    assert {
        **explicit.run.settings,
        "reduced": reduced.run.settings["reduced"],
    } == reduced.run.settings


def test_default_typed_on_command_line_is_not_reduced(inputs, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(probing, "CPU_WORK", 1)
    text, output = some_text(tmp_path, "held", windows=12), tmp_path / "curvature.jsonl"
    options = [
        "--layers",
        "h.0.attn.c_proj",
        "--eigenvalues",
        "5",
        "--ranks",
        "2",
        "--eval",
        text,
        "-o",
        output,
    ]
    words = list(map(str, [inputs["base"], inputs["tuned"], *options]))
    commands("probe curvature")(["probe", "curvature", *words], standalone_mode=False)
    shown = " ".join(capsys.readouterr().out.split())
    settings = read_results(output).run.settings
    assert (settings["eigenvalues"], settings["trace_vectors"], settings["ranks"]) == (5, 5, [2])
    assert settings["reduced"] == ["--max-sequences 8 (of 12)", "--trace-vectors 5 (of 10)"]
    assert all(words in shown for words in settings["reduced"])
