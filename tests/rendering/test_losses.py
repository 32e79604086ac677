"""The summary of a probe."""

from dataclasses import replace

from lora_diag.catalog import read_results
from lora_diag.rendering.losses import on_set, probe_summary
from tests.served import ROOT


def test_unfinished_probe_says_so_first_and_names_inputs_last():
    results = read_results(ROOT / "docs" / "examples" / "sweep.jsonl")
    for each, first in ((results, "on"), (replace(results, end=None), "unfinished")):
        keys = [
            statement.key
            for statement in probe_summary(each, on_set("dev", "r=4"), reading="one run")
        ]
        assert (keys[0], keys[-1]) == (first, "compared")
