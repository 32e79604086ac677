"""A password and a signature planted in addresses appear in no output of any command,
at any width.
"""

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from lora_diag.catalog import commands
from tests.conftest import ROOT, Ran
from tests.storage.web import Web, basic

SAMPLES = ROOT / "sample_checkpoints"
QPROJ = ("--layers", r"layers\.0\.self_attn\.q_proj")
# An address where none is expected: the printed run record repeats the option as it was given.
QPROJ_OR_ADDRESS = ("--layers", rf"{QPROJ[1]}|http://me:{{password}}@{{host}}/x")
WIDTHS = (60, 400)

# No other text contains MARK, and every cut of a secret into lines leaves one whole, since lines
# are joined again.
MARK = "Qz7"
PASSWORD, SIGNATURE = MARK * 40, MARK * 20

BASE = "http://me:{password}@{host}/base"
TUNED = "http://{host}/full_ft/model.safetensors?X-Amz-Signature={signature}"
ADAPTER = "http://me:{password}@{host}/lora_r4"
GRADIENTS = "http://{host}/gradients/grad_step000000.safetensors?sig={signature}"

# Command -> the arguments with which it measures what is at an address.
MEASURING = {
    "spectrum": [
        *([BASE, TUNED, *QPROJ, *more] for more in ((), ("--json",), ("-o", "s.jsonl"))),
        [BASE, TUNED, *QPROJ_OR_ADDRESS, "--json"],
        [ADAPTER, *QPROJ, "-v"],
        ["--gradients", GRADIENTS, *QPROJ],
    ],
    "fleet": [[ADAPTER, ADAPTER.replace("r4", "r16")]],
    "residual": [[BASE, TUNED, ADAPTER, *QPROJ]],
    "overlap": [[BASE, TUNED, GRADIENTS, *QPROJ]],
    "interference": [[BASE, ADAPTER, TUNED, *QPROJ]],
    "intruders": [[BASE, TUNED, *QPROJ]],
    "geometry": [[BASE, TUNED, *QPROJ, "--lens"]],
    "verify-merge": [[BASE, ADAPTER, TUNED, *QPROJ]],
    "portability": [[ADAPTER]],
    "plan": [[BASE]],
    "plan-merge": [[BASE, ADAPTER, "--to", "bf16", *QPROJ]],
    "recover": [[BASE, TUNED, "--rank", "2", *QPROJ, "-o", "recovered"]],
    "extract": [[BASE, TUNED, "--rank", "2", *QPROJ, "-o", "adapter"]],
    "inspect": [[BASE], [ADAPTER, "--by", "layer"]],
    "doctor": [[BASE]],
}
NAMES = [name for name, *_ in commands()]

Run = Callable[..., Ran]


@pytest.fixture(scope="module")
def web() -> Iterator[Web]:
    served = Web(SAMPLES)
    served.user = basic("me", PASSWORD)
    served.takes_signature = SIGNATURE
    yield served
    served.close()


def fill(words: list[str], host: str) -> list[str]:
    """Fill the host and the secrets into addresses; a regular expression has braces of its own."""
    for name, value in (("host", host), ("password", PASSWORD), ("signature", SIGNATURE)):
        words = [word.replace(f"{{{name}}}", value) for word in words]
    return words


def assert_hidden(done: Ran) -> None:
    """Assert that no part of a secret was printed, also if it was cut into lines, or is in a file
    of this folder.
    """
    printed = "".join((done.out + done.err).split())
    at = printed.find(MARK)
    assert at < 0, f"exit code {done.code}: …{printed[max(0, at - 200) : at + 20]}…"
    assert not [
        file for file in Path().rglob("*") if file.is_file() and MARK.encode() in file.read_bytes()
    ]


@pytest.mark.slow
@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("name", MEASURING)
def test_measuring_command_hides_secrets(name: str, width: int, web: Web, run: Run) -> None:
    for words in MEASURING[name]:
        done = run(*name.split(), *fill(words, web.host), width=width)
        assert done.code in {0, 1}, done.err
        assert_hidden(done)


@pytest.mark.slow
@pytest.mark.parametrize("width", WIDTHS)
def test_gate_hides_secrets(width: int, web: Web, run: Run, tmp_path: Path) -> None:
    results, policy = (str(tmp_path / name) for name in ("results.jsonl", "policy.toml"))
    base, tuned = fill([BASE, TUNED], web.host)
    assert run("spectrum", base, tuned, *QPROJ, "-q", "-o", results).code == 0
    assert run("gate", "init", results, "-o", policy).code == 0
    done = run("gate", policy, results, "--for", base, "--for", tuned, width=width)
    assert done.code in {0, 5}, done.out + done.err
    assert_hidden(done)
    assert_hidden(run("gate", policy, "--base", base, "--tuned", tuned, width=width))
    assert MARK not in Path(results).read_text()


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_refusing_command_hides_secrets(name: str, web: Web, run: Run) -> None:
    """Every command, given addresses as all of its arguments: those that take none name them in a
    message.
    """
    for words in (
        [BASE],
        [TUNED, BASE],
        [TUNED, BASE, ADAPTER, TUNED],
        [BASE, "--nope", TUNED],
        ["-o", TUNED, BASE],
    ):
        for width in WIDTHS:
            assert_hidden(run(*name.split(), *fill(words, "127.0.0.1:9"), width=width))


AWKWARD = [
    "http://me:{password}/word@{host}/base",
    "http://me:12/{password}@{host}/base",
    " http://me:{password}@{host}/base",
    "http://me:{password}@{host}/base ",
    "http://me:a b{password}@{host}/base",
    "http://me:'{password}@{host}/base",
    'http://me:"{password}@{host}/base',
    "http://me:<{password}@{host}/base",
    "http://me:1#{password}@{host}/base",
    "http://me:1?{password}@{host}/base",
    "http://me:\\{password}@{host}/base",
    "http://me:{password}@[::1/base",
    "http://me:{password}@h:99999/base",
    "http://me:{password}",
    "http:/me:{password}@{host}/base",
    "ftp://me:{password}@{host}/base",
    'ftp://me:{password}@{host}" ?a@b={signature}',
    "hf://me:{password}@org/name",
    "s3://bucket/x?sig={signature}",
    "--layers=http://me:{password}@{host}/a b{password}(",
]


@pytest.mark.slow
@pytest.mark.parametrize("word", AWKWARD)
def test_awkward_address_is_hidden(word: str, web: Web, run: Run) -> None:
    (address,) = fill([word], web.host)
    for words in (["spectrum", address], ["spectrum", str(SAMPLES / "base"), address], ["inspect", address],
                  ["report", address], ["gate", address, address], ["spectrum", "--base", address, address],
                  ["fleet", address], ["plan", address, "-o", address], ["spectrum", address, "x", "y"]):  # fmt: skip
        for width in (80, 400):
            done = run(*words, width=width)
            assert_hidden(done)
            assert "Traceback" not in done.err
            assert done.code in {0, 2, 3, 4}
