"""``loradiag gate`` as a user runs it, on the sample checkpoints and on results made by hand."""

import re
from xml.etree import ElementTree

import pytest

from lora_diag.gating.policy import read_policy
from tests.conftest import ROOT, edit_results
from tests.gating.making import LAYERS, spectrum, write
from tests.messages import assert_names

SAMPLES = ROOT / "sample_checkpoints"
POLICY = (
    '[[rule]]\nname = "drift"\nrequire = "relative <= {limit}"\nmessage = "look at the '
    'learning rate"\n'
)


@pytest.fixture
def results(tmp_path):
    return write(
        tmp_path / "r.jsonl", [spectrum(name, s=(4.0 + i, 1.0)) for i, name in enumerate(LAYERS)]
    )


@pytest.fixture
def policy(tmp_path):
    def make(limit=0.2, more=""):
        (tmp_path / "p.toml").write_text(POLICY.format(limit=limit) + more)
        return "p.toml"

    return make


def test_each_error_kind_has_its_exit_code(run, results, policy, tmp_path):
    write(tmp_path / "u.jsonl", [spectrum(LAYERS[0])], finished=False)
    write(tmp_path / "none.jsonl", [])
    (tmp_path / "cut.jsonl").write_bytes(results.read_bytes()[:40])
    (tmp_path / "lacking.jsonl").write_bytes(results.read_bytes())
    edit_results(tmp_path / "lacking.jsonl", lambda text: re.sub(r"\n.*", "", text, count=1))
    name = policy()
    for code, words, text in (
        (2, ["absent.toml", "r.jsonl"], "absent.toml: no such file"),
        (2, [name], "give results files"),
        (2, ["--policy", "nope", "r.jsonl"], "adapter-basic"),
        (2, [name, "r.jsonl", "--base", "x"], "remove the results file"),
        (2, [name, "--tuned", "x"], "need --base"),
        (2, [name, "r.jsonl", "--json", "--github"], "--json"),
        (2, [name, "r.jsonl", "--ratchet"], "--baseline"),
        (3, [name, "absent.jsonl"], "absent.jsonl"),
        (3, [name, "cut.jsonl"], "not a results file"),
        (3, [name, "lacking.jsonl"], "has 5 layers, but its last line states 6"),
        (4, [name, "none.jsonl"], "no records"),
        (5, [name, "u.jsonl"], ""),
    ):
        ran = run("gate", *words)
        assert (ran.code, words) == (code, words), ran.err + ran.out
        assert text in ran.err
        assert ran.err.count("\n") == (1 if text else 0)


def test_json_equals_file_and_inspect_shows_it(run, results, policy, tmp_path):
    name = policy(0.08)
    ran = run("gate", name, "r.jsonl", "--json", "-o", "v.jsonl")
    assert ran.code == 1
    assert ran.out == (tmp_path / "v.jsonl").read_text()
    assert [ran.records[0]["command"], ran.records[-1]["record"]] == ["gate", "end"]
    verdicts = [record for record in ran.records if record["record"] == "verdict"]
    assert {v["layer"] for v in verdicts if v["rule"] == "drift"} == set(LAYERS)
    live = run("gate", name, "r.jsonl").out
    repeated = run("inspect", "v.jsonl")
    assert repeated.code == 0
    assert repeated.out.strip() == live[: live.index("Next")].strip()


def test_quiet_keeps_one_line_with_reason(run, results, policy):
    ran = run("gate", policy(0.08), "r.jsonl", "-q")
    assert (ran.code, ran.out, ran.err.count("\n")) == (1, "", 1)
    words = (
        LAYERS[5].removesuffix(".weight"),
        "0.0906",
        "relative <= 0.08",
        "look at the learning rate",
    )
    assert_names(ran.err, "FAILED", "drift", *words)
    ran = run("gate", policy(0.2), "r.jsonl", "-q")
    assert (ran.code, ran.out, ran.err) == (0, "", "")


def test_reports_are_written_and_model_card_is_kept(run, results, policy, tmp_path):
    (tmp_path / "README.md").write_text("# My model\n")
    words = ["--junit", "j.xml", "--model-card", "README.md"]
    assert run("gate", policy(0.08), "r.jsonl", *words).code == 1
    root = ElementTree.fromstring((tmp_path / "j.xml").read_text())
    assert (root.get("failures"), root.find(".//failure").get("type")) == ("2", "failed")
    card = (tmp_path / "README.md").read_text()
    assert card.startswith("# My model\n")
    assert "FAILED" in card
    assert run("gate", policy(0.2), "r.jsonl", *words).code == 0
    card = (tmp_path / "README.md").read_text()
    assert "PASSED" in card
    assert "FAILED" not in card
    assert {path.name for path in tmp_path.iterdir()} == {"README.md", "j.xml", "p.toml", "r.jsonl"}


def test_github_mode_escapes_commands_and_writes_step_summary(loradiag, tmp_path, policy):
    write(
        tmp_path / "r.jsonl",
        [spectrum("::error::forged.weight"), *(spectrum(n, s=(4.0, 2.0)) for n in LAYERS)],
    )
    (tmp_path / "summary.md").write_text("earlier\n")
    env = {"GITHUB_STEP_SUMMARY": str(tmp_path / "summary.md")}
    ran = loradiag("gate", policy(0.03), "r.jsonl", "--github", env=env)
    assert ran.code == 1
    first, *lines = ran.out.splitlines()
    token = re.fullmatch(r"::stop-commands::(\w{32})", first)[1]
    end = lines.index(f"::{token}::")
    assert any("forged" in line for line in lines[:end])
    (annotation,) = lines[end + 1 :]
    assert re.match(r"::error file=p\.toml,line=1,title=loradiag gate%3A drift::", annotation)
    assert annotation.count("measured 0.04") == 3
    assert_names(annotation, "4 more", "relative <= 0.03")
    summary = (tmp_path / "summary.md").read_text()
    assert summary.startswith("earlier\n## loradiag gate: FAILED")
    assert "more are in" not in summary


def test_gate_init_writes_passing_policy(run, results, tmp_path):
    ran = run("gate", "init", "r.jsonl", "-o", "p.toml")
    assert (ran.code, ran.err) == (0, "")
    assert "loradiag gate p.toml r.jsonl" in ran.out
    assert run("gate", "p.toml", "r.jsonl").code == 0
    printed = run("gate", "init", "r.jsonl").out
    assert printed.replace("policy.toml", "p.toml") == (tmp_path / "p.toml").read_text()
    content = (tmp_path / "p.toml").read_bytes()
    refused = run("gate", "init", "r.jsonl", "-o", "p.toml")
    assert (refused.code, "--overwrite" in refused.err, (tmp_path / "p.toml").read_bytes()) == (
        2,
        True,
        content,
    )
    assert run("gate", "init", "r.jsonl", "-o", "p.toml", "-q", "--overwrite").code == 0


def test_gate_measures_like_existing_file(run, tmp_path):
    base, adapter = SAMPLES / "base", SAMPLES / "lora_r4"
    assert run("spectrum", base, adapter, "-o", "s.jsonl", "-q").code == 0
    assert run("gate", "--policy", "adapter-basic", "s.jsonl", "-q", "-o", "a.jsonl").code == 0
    words = ["--base", base, "--adapter", adapter]
    assert run("gate", "--policy", "adapter-basic", *words, "-q", "-o", "b.jsonl").code == 0
    a, b = ((tmp_path / name).read_text().splitlines()[1:-1] for name in ("a.jsonl", "b.jsonl"))
    assert len(a) > 30
    assert a == b


def test_adapter_is_measured_against_base_and_fine_tune(run, tmp_path):
    (tmp_path / "p.toml").write_text(
        '[[rule]]\nname = "far"\nrequire = "residual.epsilon <= 1"\nlayers = "q_proj"\nwhere = '
        '{role = "adapter"}\n'
        '[[rule]]\nname = "near"\nrequire = "spectrum.relative <= 1"\n'
    )
    words = [
        "--base",
        SAMPLES / "base",
        "--tuned",
        SAMPLES / "full_ft",
        "--adapter",
        SAMPLES / "lora_r4",
    ]
    ran = run("gate", "p.toml", *words, "--json")
    statuses = {(record["rule"], record["status"]) for record in ran.records if record.get("layer")}
    assert ran.code == 1
    assert statuses == {("far", "failed"), ("near", "passed")}


def test_page_shows_printed_failure_and_valid_policies(loradiag, tmp_path):
    page = (ROOT / "docs" / "reference" / "gate.md").read_text(encoding="utf-8")
    small, *policies = re.findall(r"^```toml\n(.*?)^```", page, re.DOTALL | re.MULTILINE)
    assert [len(read_policy("p.toml", text).rules) for text in policies] == [3, 1]
    (tmp_path / "policy.toml").write_text(small)
    for name in ("base", "full_ft"):
        (tmp_path / name).symlink_to(SAMPLES / name)
    loradiag("spectrum", "base", "full_ft", "-q", "-o", "results.jsonl")
    ran = loradiag("gate", "policy.toml", "results.jsonl", env={"COLUMNS": "80"}, brief=True)
    assert ran.code == 1
    printed = ran.out.strip("\n")
    assert f"```console\n$ loradiag gate policy.toml results.jsonl\n{printed}\n```" in page
