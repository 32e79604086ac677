"""Regular expressions of a config: PEFT's results, or one message in bounded time."""

import contextlib
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lora_diag.adapters import patterns
from lora_diag.adapters.patterns import find_targets, read_pattern
from lora_diag.adapters.source import Config, ends_of, is_named
from lora_diag.errors import InputError
from tests.conftest import ROOT, time_limit
from tests.messages import raises_naming

MODULES = [
    f"model.layers.{layer}.self_attn.{name}" for layer in range(80) for name in ("q_proj", "v_proj")
]
PATH = Path("adapter_config.json")

# Matching is ended after 0.5 or 2 s of its own.
PATIENCE = 30

# As Unsloth writes for vision models, and ms-swift for multimodal ones.
UNSLOTH = (
    r"(?:.*?(?:vision|image|visual|patch|language|text).*?(?:self_attn|attention|attn|mlp|feed_forward|ffn|dense).*?"
    r"(?:q_proj|k_proj|v_proj|o_proj|gate_proj|up_proj|down_proj).*?)|(?:\bmodel\.layers\.[\d]{1,}\."
    r"(?:self_attn|attention|attn|mlp|feed_forward|ffn|dense)\.(?:(?:q_proj|k_proj|v_proj|o_proj|gate_proj)))"
)
SWIFT = r"^(model\.layers(?=\.).*\.(q_proj|k_proj|o_proj|gate_proj|up_proj|down_proj))$"
USUAL = [
    r"q_proj", r"^model\.layers\.(0|1|2|3|10|20|30|31)\.self_attn\.(q|k|v|o)_proj$", r".*\.layers\.\d+\..*_proj",
    r"model\.layers\.([0-9]|1[0-5])\.mlp\.(gate|up|down)_proj", r"[a-z]+_proj", r"(?:q|v)_proj",
    r"layers\.\d{1,2}\.x", r"model.layers.1.self_attn.q_proj", r".*(?<!self_attn)\.q_proj", UNSLOTH, SWIFT,
]  # fmt: skip
HOSTILE = [
    r"([a-z_.0-9]+)+X", r"([a-z_.0-9]+)(?#:)+X", r"(?x:([a-z_.0-9]+) +X)", r"(.*)*x", r"(\w+\.?)+!", r"(?:.+)+$X",
    r"(?=(([a-z_.0-9]+)+X))", r"(.*.*.*.*.*.*.*.*x)",
]  # fmt: skip
EITHER = ["rank_pattern", "alpha_pattern", "target_modules", "exclude_modules"]


def use(key: str, pattern: str, modules: list[str] = MODULES) -> set[str]:
    """Return the modules that a pattern of a config matches."""
    if key.endswith("_pattern"):
        read = read_pattern(Config(PATH, {key: {pattern: 4}}), key, modules)
        return {module for module in modules if read.matches(module)}
    return set(find_targets(Config(PATH, {key: pattern}), modules, key))


@pytest.mark.parametrize("pattern", USUAL)
def test_usual_patterns_match_like_peft(pattern: str) -> None:
    keyed = re.compile(rf"(.*\.)?({pattern})$")
    assert use("rank_pattern", pattern) == {module for module in MODULES if keyed.match(module)}
    assert use("target_modules", pattern) == {
        module for module in MODULES if re.fullmatch(pattern, module)
    }


def test_target_names_match_whole_parts() -> None:
    config = Config(PATH, {"target_modules": ["q_proj", "0.v"], "exclude_modules": "all-linear"})
    assert find_targets(config, ["a.q_proj", "a.xq_proj", "a.0.v", "q_proj", "q_proj.a"]) == {
        "a.q_proj", "a.0.v", "q_proj",
    }  # fmt: skip
    assert find_targets(config, ["a", "all-linear"], "exclude_modules") == {"all-linear"}
    assert find_targets(Config(PATH, {"target_modules": "all-linear"}), ["a", "b"]) == {"a", "b"}
    with pytest.raises(InputError, match="exclude_modules must be names"):
        find_targets(Config(PATH, {"exclude_modules": [1]}), ["a"], "exclude_modules")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("key", "pattern"),
    [*((key, HOSTILE[1]) for key in EITHER), *(("target_modules", pattern) for pattern in HOSTILE)],
)
def test_hostile_pattern_ends_with_a_message(
    key: str, pattern: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(patterns, "SECONDS", 0.5)
    message = r"adapter_config\.json: .*could not be matched with 160 names"
    with time_limit(PATIENCE), pytest.raises(InputError, match=message) as caught:
        use(key, pattern)
    assert f"{key}: the pattern {pattern!r}" in str(caught.value)


def test_time_of_patterns_is_as_promised() -> None:
    assert patterns.SECONDS <= 10


# A process that matches a pattern for years, and its number.
MATCHING = """
from pathlib import Path
from lora_diag.adapters import patterns
from lora_diag.adapters.source import Config, ends_of, is_named
patterns.SECONDS = 2.0
patterns.find_targets(Config(Path("c"), {"target_modules": r"([a-z_.0-9]+)+X"}), ["model.layers.0.self_attn.q_proj"])
"""


def is_running(process: int) -> bool:
    """Return whether a process has not ended; one that nobody waits for is a zombie."""
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


@pytest.mark.slow
@pytest.mark.skipif(
    not Path("/proc/self/task").is_dir(), reason="processes are listed by Linux only"
)
def test_matching_ends_after_its_parent_was_killed() -> None:
    parent = subprocess.Popen([sys.executable, "-c", MATCHING], cwd=ROOT, start_new_session=True)
    children = Path(f"/proc/{parent.pid}/task/{parent.pid}/children")
    with time_limit(PATIENCE):
        while not (started := children.read_text().split()):
            assert parent.poll() is None
            time.sleep(0.01)
    (child,) = map(int, started)
    parent.kill()
    parent.wait()
    assert is_running(child)
    try:
        with time_limit(PATIENCE):
            while is_running(child):
                time.sleep(0.05)
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.kill(child, signal.SIGKILL)


def test_matching_that_only_waits_is_ended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "waiting.py").write_text("import time\ntime.sleep(1000)\n")
    monkeypatch.setattr(patterns.matcher, "__file__", str(tmp_path / "waiting.py"))
    monkeypatch.setattr(patterns, "SECONDS", 0.2)
    with time_limit(PATIENCE), pytest.raises(InputError, match="could not be matched"):
        use("target_modules", "(a|b)+only here")


def test_slow_pattern_among_others_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(patterns, "SECONDS", 2.0)
    table = {"(q|v)_proj": 4, HOSTILE[0]: 8, "[a-z]+": 2}
    with time_limit(PATIENCE), pytest.raises(InputError) as caught:
        read_pattern(Config(PATH, {"rank_pattern": table}), "rank_pattern", MODULES)
    assert repr(HOSTILE[0]) in str(caught.value)


@pytest.mark.parametrize(
    "pattern", ["(", "a{99999999999}", "(" * 5000, "*", r"(?<=a+)b", "x" * 200_000, "a\\"]
)
@pytest.mark.parametrize("key", EITHER)
def test_invalid_pattern_is_refused(key: str, pattern: str) -> None:
    with pytest.raises(InputError) as caught:
        use(key, pattern, ["a"])
    assert len(str(caught.value)) < 400


@pytest.mark.slow
@settings(max_examples=30)
@given(st.text(alphabet=r"ab.*+?|()[]{}1,\\^$", max_size=14))
def test_any_pattern_matches_like_peft_or_is_refused(pattern: str) -> None:
    modules = ["a.b", "ab", "aa.bb.a", "b1", "aaaa"]
    try:
        result = use("rank_pattern", pattern, modules)
    except InputError as error:
        assert "valid regular expression" in str(error) or "could not be matched" in str(error)  # noqa: PT017
        return
    compiled = re.compile(rf"(.*\.)?({pattern})$")
    assert result == {module for module in modules if compiled.match(module) or module == pattern}


def test_ends_of_module_are_the_names_that_match_it() -> None:
    names = {module[start:] for module in MODULES[:3] for start in range(len(module))} | {
        "",
        "x",
        "proj",
        ".q_proj",
    }
    for module in [*MODULES[:3], "a", "", "a..b", "a."]:
        assert {name for name in names if is_named(module, name)} == names & {*ends_of(module)}


@pytest.mark.slow
def test_many_plain_patterns_are_matched_in_bounded_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(patterns, "SECONDS", 0.3)
    table = {f"m{number}": 8 for number in range(30_000)}
    with time_limit(PATIENCE), raises_naming(InputError, PATH.name, "rank_pattern"):
        read_pattern(Config(PATH, {"rank_pattern": table}), "rank_pattern", MODULES)


def test_value_of_wrong_type_is_quoted_in_short() -> None:
    config = Config(
        PATH, {"r": 10**4000, "rank_pattern": {"a": ["x"] * 10_000}, "target_modules": [1] * 10_000}
    )
    uses: dict[str, Callable[[], object]] = {
        "r": lambda: config.integer("r"),
        "rank_pattern": lambda: read_pattern(config, "rank_pattern", MODULES),
        "target_modules": lambda: find_targets(config, MODULES),
    }
    for key, use_of_key in uses.items():
        with raises_naming(InputError, PATH.name, key) as caught:
            use_of_key()
        assert len(str(caught.value)) < 300
