"""The guard around the regular expressions of a config."""

import re
import time
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lora_diag.adapters.patterns import MAX_STEPS, is_target, module_targets, read_pattern, worst_case
from lora_diag.adapters.source import Config
from lora_diag.errors import InputError

MODULES = [f"model.layers.{layer}.self_attn.{name}" for layer in range(80) for name in ("q_proj", "v_proj")]


def read(key):
    return read_pattern(Config("config.json", {"rank_pattern": {key: 4}}), "rank_pattern", MODULES)


@pytest.mark.parametrize(
    "key",
    [
        r"q_proj", r"^model\.layers\.(0|1|2|3|10|20|30|31)\.self_attn\.(q|k|v|o)_proj$", r".*\.layers\.\d+\..*_proj",
        r"model\.layers\.([0-9]|1[0-5])\.mlp\.(gate|up|down)_proj", r"[a-z]+_proj", r"(?:q|v)_proj",
        r"layers\.\d{1,2}\.x",
    ],
)  # fmt: skip
def test_usual_patterns_are_read(key):
    read(key).notes(MODULES)


@pytest.mark.parametrize(
    "key",
    [
        r"(a+)+b", r"(.*)*x", r"(a|a)*b", r"(\w+\.?)+!", r".*.*.*.*.*.*.*x", r"(a?){40}a{40}", r"(a{1,9}){1,9}!",
        "a?" * 60 + "a" * 60, r"(x(y+)z)*", "x" * 2000, r"((a|b)c){20}!", r"(?:.+)+$",
    ],
)  # fmt: skip
def test_exponential_pattern_is_refused(key):
    with pytest.raises(InputError, match="could take too long"):
        read(key)


@given(st.text(alphabet=r"ab.*+?|()[]{}1,\\^$", max_size=14))
def test_every_config_key_is_handled(key):
    begin = time.process_time()
    try:
        read(key).notes(MODULES[:4])
    except InputError:
        pass
    except RecursionError:
        pytest.fail("recursion")
    assert time.process_time() - begin < 60


@pytest.mark.parametrize("n", [10, 15, 20])
def test_pattern_bound_is_one(n):
    """Steps counted on a pattern whose ways are known: q stars on n letters that end in a mismatch."""
    for stars in range(3):
        ways = sum(1 for _ in re.finditer("a", "a" * n)) ** stars
        assert worst_case("a*" * stars + "!", n) >= ways / max(1, stars)


def test_target_expression_matches_whole_paths_and_steps():
    path = Path("adapter_config.json")
    assert is_target("h.0.q_proj", r".*\.q_proj", path)
    assert not is_target("h.0.q_proj.inner", r".*\.q_proj", path)
    assert not is_target("x.h.0.q_proj", r"h\.\d+\.q_proj", path)
    names = r".*\d+.*q_proj"
    config = Config(path, {"target_modules": names})
    count = int(MAX_STEPS // worst_case(names, len(MODULES[0])))
    assert module_targets(config, MODULES[:1] * count) == names
    with pytest.raises(InputError, match="could take too long"):
        module_targets(config, MODULES[:1] * (count + 1))
