"""Losses in the report: they lead, in any mix of runs; every number is a record's; of unfinished runs, too."""

import pytest

from lora_diag.catalog import features
from lora_diag.records import Results
from lora_diag.reports.html import html_report
from lora_diag.reports.markdown import markdown_report
from tests.plots import making
from tests.reports.test_html import Elements, evidence

pytestmark = pytest.mark.slow


def outputs(sets=("held_out", "other")):
    measured = {"kept": 0.6, "distance": 0.654, "kl": 0.21, "agreement": 0.83}
    records = [r.model_copy(update=measured) if r.name else r for r in making.said(sets=sets)]
    return making.probed(records, command="probe outputs", adapters=("runs/r4", "runs/r16"))


KINDS = {
    "outputs": outputs,
    "sweep": lambda: making.probed(making.swept()),
    "truncation": lambda: making.probed(making.truncated(), command="probe truncation"),
}


def test_tables_have_numbers_of_records():
    page = html_report(evidence(outputs(), KINDS["truncation"](), KINDS["sweep"]()))
    words = Elements(page).words
    for record in outputs().whole:
        assert f"{record.loss:.4f}" in words
    for record in KINDS["truncation"]().whole:
        assert f"{record.loss:.4f}" in words
        assert record.energy is None or f"{record.energy:.2f}" in words
    # The hidden states, depth by depth; where TUNED has BASE's there is no distance.
    depths = [value for record in outputs().whole if record.name for value in record.hidden if value is not None]
    assert {"0 (input)", "same", *(f"{value:.2f}" for value in depths)} <= set(words)
    assert {"0.654", "83%", "0.21"} <= set(words)


def test_unfinished_run_is_shown_partially():
    whole = outputs()
    for count in range(len(whole.whole) + 1):
        cut = Results(whole.run, (), (), None, whole.whole[:count])
        assert 'role="alert"' in html_report(evidence(cut))
    for name in ("sweep", "truncation"):
        cut = Results(KINDS[name]().run, (), (), None, KINDS[name]().whole[:1])
        assert markdown_report(evidence(cut))


def test_every_probe_with_table_has_section():
    commands = {feature.name for feature in features() if feature.statements and feature.name.startswith("probe ")}
    assert commands == {feature.name for feature in features() if feature.section and feature.name.startswith("probe ")}
