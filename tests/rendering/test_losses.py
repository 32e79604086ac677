"""The summary of a probe."""

from dataclasses import replace

import pytest
from scipy import stats

from lora_diag.catalog import read_results
from lora_diag.records import Probe
from lora_diag.rendering.losses import caption_of, on_set, probe_summary
from lora_diag.rendering.tables import columns_of
from tests.building import results
from tests.served import ROOT


def test_unfinished_probe_says_so_first_and_names_inputs_last():
    results = read_results(ROOT / "docs" / "examples" / "sweep.jsonl")
    for each, first in ((results, "on"), (replace(results, end=None), "unfinished")):
        keys = [
            statement.key
            for statement in probe_summary(each, on_set("dev", "r=4"), reading="one run")
        ]
        assert (keys[0], keys[-1]) == (first, "compared")


@pytest.mark.parametrize(("count", "few"), [(1, True), (7, True), (8, False)])
def test_short_text_is_flagged_first_with_its_size(count, few):
    record = Probe(probe="outputs", set="dev", subject="base", tokens=3 * count, data="d", loss=1.0)
    found = results((), command="probe outputs", inputs=(("eval", "dev.txt"),), finished=False)
    side = found.run.inputs[0].model_copy(update={"tensors": count, "fingerprint": "d"})
    settings = {"length": 4, "dtype": "float32", "device": "cpu", "tokens": "bytes"}
    run = found.run.model_copy(update={"inputs": (side,), "settings": settings})
    statements = probe_summary(replace(found, run=run), on_set("dev", "r=4"), reading="")
    assert [statement.key for statement in statements[:2]] == ["unfinished", "few" if few else "on"]
    sizes = {1: "1 sequence of 3", 7: "7 sequences of 3", 8: "8 sequences of 3"}
    assert sizes[count] in caption_of(replace(found, run=run), record)


def test_printed_interval_is_the_one_that_decides():
    """The 95.45% interval of a paired difference by Student's t: 16 sequences, blocks of 4."""
    record = Probe(
        probe="outputs", set="dev", subject="adapter", tokens=16, data="d", loss=1.0, gap=0.3,
        gap_error=0.1, nll=(1.0,) * 16,
    )  # fmt: skip
    half = 0.1 * stats.t.ppf(stats.norm.cdf(2), 1.5 * (16 / 4 - 1))
    (column,) = [c for c in columns_of(Probe.shown, [("a", [record])]) if c.title == "to TUNED"]
    assert column.cells == (f"+0.3000 ±{half:#.2g}",)
