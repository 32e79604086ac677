"""The answer to a gate, in a terminal and in reports: failures first, all of it in the width there
is.
"""

import pytest

from lora_diag.gating.show import verdict_table
from lora_diag.rendering.verdicts import format_measured
from tests.gating.gated import HOSTILE, results, verdict


@pytest.mark.parametrize(
    ("value", "allowed", "shown"),
    [
        (0.35, "epsilon <= 0.35", "0.35"),
        (0.35001, "epsilon <= 0.35", "0.35001"),
        (0.346049, "epsilon <= 0.34604", "0.346049"),
        (0.7123456, "epsilon <= 0.35", "0.712"),
        (0.94999, "share of layers with x == y is >= 0.95", "0.94999"),
        (0.79999, "energy.16 >= 0.8 (0.82 in the baseline)", "0.79999"),
    ],
)
def test_shown_value_stays_on_its_side_of_limit(value, allowed, shown):
    assert format_measured(verdict(measured=value, allowed=allowed)) == shown


def test_hostile_name_stays_text():
    text = verdict_table(results(verdict(layer=HOSTILE, message=HOSTILE, group=HOSTILE)), 140)
    assert "\x1b" not in text
    assert "\u202e" not in text
    text.encode("utf-8")
