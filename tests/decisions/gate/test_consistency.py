"""Records that contradict each other: real ones do not, and no edit of a number that others follow from goes unseen."""

import json

import pytest

import lora_diag
from lora_diag.decisions.gate import consistency
from lora_diag.decisions.gate.ready import ready_policy
from lora_diag.decisions.gate.run import gate
from lora_diag.diagnostics.spectrum.record import Spectrum
from lora_diag.errors import InputError
from lora_diag.metrics import resolution
from lora_diag.records import Results
from tests.conftest import ROOT, edit_results
from tests.decisions.gate.making import LAYERS, residual, spectrum, write
from tests.messages import assert_names, raises_naming

SAMPLES = ROOT / "sample_checkpoints"
SOME = r"layers\.[01]\.(self_attn\.q|mlp\.up)_proj"


@pytest.fixture(scope="module")
def measured():
    base, tuned, adapter = (SAMPLES / name for name in ("base", "full_ft", "lora_r4"))
    return {
        "tuned": lora_diag.spectrum(base, tuned, layers=SOME),
        "top": lora_diag.spectrum(base, tuned, layers=SOME, top=5),
        "krylov": lora_diag.spectrum(base, tuned, layers=SOME, top=5, method="krylov"),
        "adapter": lora_diag.spectrum(base, adapter, layers=SOME),
        "still": lora_diag.spectrum(base, base, layers=SOME),
        "residual": lora_diag.residual(base, tuned, [adapter, SAMPLES / "lora_r16"], layers=SOME),
    }


def test_real_records_agree(measured):
    for name, results in measured.items():
        assert list(consistency.find_contradictions(results)) == [], name


# Fields of which nothing else in the file tells anything.
FREE = {
    "spectrum": {"layer", "dtypes", "method", "energy_error", "blocks", "source", "stack", "metric", "weights_fro"},
    "residual": {"layer", "adapter", "role", "rank", "method", "energy_error", "blocks", "shape", "limited_by"}
    | {"column_space", "row_space", "resolution"},
}
# Within a record, what is free: bounds on rounding, what was estimated from the entries, and shares of neither. The
# noise and its edge confine each other to a range (`test_edge_out_of_range_is_detected`).
FREE_INSIDE = {("resolution", name) for name in ("unchanged", "mantissa", "rounding_fro", "noise_fro", "edge")}
FREE_INSIDE |= {("resolution", name) for name in ("base_noise_fro", "base_rounding", "untouched")}


def numbers(value, path=()):
    if isinstance(value, dict | list):
        for key, item in value.items() if isinstance(value, dict) else enumerate(value):
            yield from numbers(item, (*path, key))
    elif type(value) in {int, float}:
        yield path, value


def edited(results, index, path, value):
    content = results.layers[index].model_dump(mode="json")
    inner = content
    for step in path[:-1]:
        inner = inner[step]
    inner[path[-1]] = value
    layers = list(results.layers)
    layers[index] = type(layers[index]).model_validate(content)
    return Results(results.run, tuple(layers), results.left_out, results.end)


@pytest.mark.parametrize("name", ["tuned", "top", "krylov", "adapter", "residual"])
def test_edited_number_is_detected(measured, name):
    results = measured[name]
    record = results.layers[0].model_dump(mode="json")
    tried = 0
    for path, value in numbers(record):
        if (
            path[-1] == "spectral_error"
            or path[0] in FREE[record["record"]]
            or path[:2] in FREE_INSIDE
            or path[0] == "shape"
        ):
            continue
        if path[0] == "s" and path[1] >= 5:
            continue  # a small one changes little: the next test has them all
        for change in (0.9, 1.1):
            new = value * change if type(value) is float else value + (1 if change > 1 else -1)
            if value == 0 or new == value:
                continue
            try:
                problems = list(consistency.find_contradictions(edited(results, 0, path, new)))
            except ValueError:
                continue  # no record at all any more
            tried += 1
            assert problems, (path, value, new)
    assert tried >= 20


def test_edited_singular_value_is_detected(measured):
    """Of the smallest values an edit is below what the certificate lets one see, and no field judges them alone."""
    results = measured["tuned"]
    s, fro = results.layers[0].s, results.layers[0].fro
    for i in range(len(s)):
        problems = list(consistency.find_contradictions(edited(results, 0, ("s", i), s[i] * 2)))
        assert problems or 3 * (s[i] / fro) ** 2 < 1e-7, i


@pytest.mark.parametrize("factor", [0.05, 20.0])
@pytest.mark.parametrize("name", ["edge", "noise_fro"])
def test_edge_out_of_range_is_detected(measured, name, factor):
    results = measured["tuned"]
    seen = getattr(results.layers[0].resolution, name)
    problems = list(consistency.find_contradictions(edited(results, 0, ("resolution", name), seen * factor)))
    assert any("resolution.edge" in problem for problem in problems)


def test_factor_in_every_record_is_detected(measured):
    results = measured["adapter"]
    layers = tuple(r.model_copy(update={"base_fro": 10 * r.base_fro}) for r in results)
    problems = list(consistency.find_contradictions(Results(results.run, layers, results.left_out, results.end)))
    assert len(problems) == 1
    assert problems[0].startswith("end: base_fro")


def test_raised_verdict_is_detected():
    record = spectrum(LAYERS[0], verdict="unresolved")
    record["resolution"]["verdict"] = "resolved"
    problems = contradictions_of(record)
    assert ["resolution.verdict" in problem for problem in problems] == [True]


def contradictions_of(*records):
    layers = tuple(Spectrum.model_validate(record) for record in records)
    return list(consistency.find_contradictions(Results(None, layers)))


def test_resolution_limits_use_metric():
    assert (consistency.RESOLVED, consistency.UNRESOLVED) == (resolution.RESOLVED, resolution.UNRESOLVED)


@pytest.mark.parametrize(
    ("change", "text"),
    [({"fro": -1.0}, "fro"), ({"base_fro": -1.0}, "base_fro"), ({"energy": {"4": 7.0, "8": 1.0, "16": 1.0}}, "energy")],
)
def test_impossible_norm_or_fraction_is_refused(tmp_path, change, text):
    path = write(tmp_path / "r.jsonl", [spectrum(LAYERS[0], **change)])
    with raises_naming(InputError, "line 2", text):
        lora_diag.read_results(path)


def test_gate_refuses_with_layer_and_numbers(loradiag, tmp_path):
    records = [spectrum(name) for name in LAYERS]
    records[2]["stable_rank"] = 9.0
    write(tmp_path / "r.jsonl", records)
    ran = loradiag("gate", "--policy", "full-ft-drift", "r.jsonl")
    assert (ran.code, ran.out) == (3, "")
    assert f"r.jsonl: {LAYERS[2]}: stable_rank is 9, but fro²/σ_1² is 1.3125" in ran.err


def test_baseline_is_checked_as_well(tmp_path):
    path = write(tmp_path / "r.jsonl", [residual(LAYERS[0], "a", 0.5)])
    main = tmp_path / "main.jsonl"
    main.write_text(path.read_text())
    edit_results(main, lambda text: text.replace('"norm_ratio": 1.5', '"norm_ratio": 1.4'))
    assert main.read_text() != path.read_text()
    policy = tmp_path / "p.toml"
    policy.write_text('[[baseline]]\nfield = "residual.epsilon"\nworse = "higher"\n')
    with pytest.raises(InputError, match=r"norm_ratio is 1\.4, but 1\.5"):
        gate(policy, path, baseline=main)


def test_edited_file_is_refused_by_its_hash(loradiag, tmp_path):
    loradiag("spectrum", SAMPLES / "base", SAMPLES / "lora_r4", "-q", "-o", "s.jsonl", "--layers", SOME)
    assert ready_policy("adapter-basic")
    content = (tmp_path / "s.jsonl").read_text()
    (tmp_path / "s.jsonl").write_text(content.replace('"method":"factored"', '"method":"gram"', 1))
    ran = loradiag("gate", "--policy", "adapter-basic", "s.jsonl")
    assert (ran.code, ran.out) == (3, "")
    assert_names(ran.err, "s.jsonl", "SHA-256")
    assert json.loads(content.splitlines()[-1])["sha256"]
