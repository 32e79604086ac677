"""``allocate --portable``: one rank for all, the best of those tried, in a config that every
program scales alike.
"""

import json

import pytest

import lora_diag
from lora_diag.adapters.contents import Contents, Item
from lora_diag.decisions.allocate.measure import GRID
from lora_diag.decisions.allocate.run import write_allocation
from lora_diag.diagnostics.portability.consumers import CONSUMERS
from lora_diag.errors import UsageError
from tests.decisions.allocate.records import llama, results

SPECTRA = results(*llama(3))


@pytest.mark.parametrize("more", [{}, {"allowed_ranks": [2, 4]}, {"min_rank": 2}])
def test_portable_allocation_is_the_best_of_one_rank(more):
    """By brute force: the best of the allocations that allow one rank each."""
    result = lora_diag.allocate(SPECTRA, params=2000, portable=True, **more)
    (rank,) = {each.rank for each in result} - {0}
    kept = {}
    for one in more.get("allowed_ranks", GRID):
        if one < more.get("min_rank", 0):
            continue
        try:
            alone = lora_diag.allocate(SPECTRA, params=2000, **{**more, "allowed_ranks": [one]})
        except UsageError:
            continue
        kept[one] = alone.whole[0].kept
    assert len(kept) > 1
    assert result.whole[0].kept == max(kept.values()) == kept[rank]
    free = lora_diag.allocate(SPECTRA, params=2000, **more)
    assert result.whole[0].gap == pytest.approx(1 - result.whole[0].kept / result.whole[0].bound)
    assert result.whole[0].kept <= result.whole[0].bound
    assert free.whole[0].kept >= result.whole[0].kept


def test_portable_config_is_exact_in_every_program(tmp_path):
    options = {
        "params": 1500,
        "min_rank": 1,
        "exclude": "self_attn",
    }  # SGLang wants q and v of a layer both
    result = lora_diag.allocate(SPECTRA, portable=True, **options)
    write_allocation(result, tmp_path / "adapter_config.json", scaling=3.0)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert (config["rank_pattern"], config["alpha_pattern"]) == ({}, {})
    items = tuple(
        Item(
            each.layer,
            each.layer.removesuffix(".weight"),
            "factors",
            "lora_B",
            each.rank,
            3.0,
            None,
            each.shape,
        )
        for each in result
        if each.rank
    )
    contents = Contents("peft", items, config)
    for consumer in CONSUMERS.values():
        for rule in consumer.rules if "peft" in consumer.forms else ():
            assert not rule.refuses(contents), (consumer.name, rule.versions)
            assert {rule.applies(contents, item).scale for item in items} == {3.0}
    plain = lora_diag.allocate(SPECTRA, **options)
    write_allocation(plain, tmp_path / "plain.json", scaling=3.0)
    assert json.loads((tmp_path / "plain.json").read_text())["rank_pattern"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"energy": 0.9}, "energy gives each its own"),
        ({"params": 3}, "even the cheapest rank"),
        ({"params": 2000, "min_rank": 5, "max_rank": 5}, "no rank lies between"),
    ],
)
def test_portable_allocation_refuses_per_layer_options(options, message):
    with pytest.raises(UsageError, match=message):
        lora_diag.allocate(SPECTRA, portable=True, **options)


def test_portable_allocation_and_rslora_contradict(tmp_path):
    result = lora_diag.allocate(SPECTRA, params=2000, portable=True)
    with pytest.raises(UsageError, match="SGLang and llama"):
        write_allocation(result, tmp_path / "adapter_config.json", rslora=True)
