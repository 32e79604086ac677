"""What the summary says of a run: only what its records can carry."""

import pytest

from lora_diag.diagnostics.spectrum.show import suggest_next, summary_lines
from lora_diag.rendering.statements import find
from tests.building import layer_spectrum, results
from tests.messages import assert_names


def record(layer, verdict="resolved"):
    """Return a record of equal singular values: C(r) = r/32."""
    seen = {"noise_fro": 0.1, "signal_rank": 32, "verdict": verdict}
    return layer_spectrum(layer, [1.0] * 32, (8, 16, 64), shape=(32, 32), tail={}, resolution=seen)


def summary_of(records):
    return summary_lines(results(records, norms=1.0, ranks=[8, 16, 64], top=None))


def test_next_command_keeps_selection_of_layers():
    found = results([record("layers.0.q_proj.weight")], norms=1.0, ranks=[8], top=None)
    values = dict.fromkeys(("activations", "kfac", "output", "exclude"))
    hint = suggest_next(found, values | {"base": "b", "tuned": "t", "layers": "0.*q_proj"})
    assert_names(hint.command, "probe gain", "--layers {layers}")
    assert "exclude" not in hint.command


@pytest.mark.parametrize(
    ("mantissa", "source"), [((7, 7), "rounding is"), ((23, 0), "quantized format")]
)
def test_unresolved_update_is_not_to_be_truncated(mantissa, source):
    seen = {"noise_fro": 5.0, "signal_rank": 0, "verdict": "unresolved", "mantissa": mantissa}
    one = layer_spectrum(
        "layers.0.q_proj.weight", [1.0] * 32, (8, 16, 64), shape=(32, 32), resolution=seen
    )
    found = results([one], norms=1.0, ranks=[8, 16, 64], top=None)
    hint = suggest_next(
        found,
        dict.fromkeys(("activations", "kfac", "output", "exclude", "layers")) | {"tuned": "t"},
    )
    assert_names(hint.command, "recover")
    assert_names(find(summary_lines(found), "resolved").lead, source)


def test_every_reason_has_text():
    from typing import get_args

    from lora_diag.records.run import Reason
    from lora_diag.rendering.statements import REASONS

    assert set(REASONS) == set(get_args(Reason))


@pytest.mark.parametrize(
    ("verdicts", "level"),
    [
        (["resolved"] * 2, "note"),
        (["floor-limited"] * 3, "warning"),
        (["floor-limited", "unresolved"], "warning"),
        (["resolved", "floor-limited"], "warning"),
        (["resolved", "unresolved", "unresolved"], "failure"),
    ],
)
def test_level_of_resolution_follows_from_verdicts(verdicts, level):
    records = [
        record(f"layers.{i}.q_proj.weight", verdict=verdict) for i, verdict in enumerate(verdicts)
    ]
    assert find(summary_of(records), "resolved").level == level


@pytest.mark.parametrize(("beta", "cleared"), [(0.02, True), (0.98, False)])
def test_pooled_layers_resolve_rounded_start(beta, cleared):
    """Errors of 0.3 of ten layers are 0.09 together; the noise is 1 of ‖ΔW‖² = 32, and 0.19 without
    that of BASE.
    """
    noise = {"noise_fro": 1.0, "signal_rank": 32, "verdict": "floor-limited", "base_noise_fro": 0.9}
    noise |= {"start": "unknown", "base_rounding": (beta, 0.3)}
    names = [f"model.layers.{i}.q_proj.weight" for i in range(10)]
    records = [
        layer_spectrum(name, [1.0] * 32, [8, 16, 64], shape=(32, 32), resolution=noise)
        for name in names
    ]
    start = find(summary_of(records), "start")
    assert (start is not None) == cleared
    if start is not None:
        assert_names(start.lead, f"{beta} ± 0.09", "10 of 10 matrices")
