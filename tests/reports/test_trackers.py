"""Reports in experiment trackers, each by its own library without a network, where it
is installed.
"""

import json
from pathlib import Path

import pytest

from lora_diag.catalog import read_results
from lora_diag.errors import InputError, UsageError
from lora_diag.records.base import value_at
from lora_diag.reports.trackers import payload_of, track
from tests.served import ROOT

SPECTRUM = ROOT / "docs" / "examples" / "spectrum.jsonl"
SWEEP = ROOT / "docs" / "examples" / "sweep.jsonl"


@pytest.mark.slow
def test_payload_pools_main_columns():
    results = read_results(SPECTRUM)
    payload = payload_of([results, SWEEP])
    kept = sorted(value_at(record, "energy.16") for record in results)
    middle = (kept[len(kept) // 2] + kept[(len(kept) - 1) // 2]) / 2
    assert payload.scalars["spectrum/energy.16"] == pytest.approx(middle)
    assert payload.tables["spectrum"] == results.columns()
    assert any(name.startswith("probe_sweep/") for name in payload.scalars)
    assert payload.config["spectrum"]["settings.svd"] == results.run.settings["svd"]
    assert all(png.startswith(b"\x89PNG") for png in payload.figures.values())
    assert {"energy", "sweep"} <= payload.figures.keys()


def test_payload_numbers_runs_of_one_command():
    assert set(payload_of([SPECTRUM, SPECTRUM]).tables) == {"spectrum_1", "spectrum_2"}


def test_card_section_is_replaced(tmp_path):
    card = tmp_path / "README.md"
    card.write_text("---\nlicense: mit\n---\n# Mine\n", encoding="utf-8")
    assert track([SPECTRUM], "hub", str(tmp_path)) == str(card)
    first = card.read_text(encoding="utf-8")
    assert first.startswith("---\nlicense: mit\n---\n# Mine\n")
    assert "C(16)" in first
    assert "\n# " not in first[first.index("loradiag report") :]
    track([SPECTRUM], "hub", str(tmp_path))
    assert card.read_text(encoding="utf-8") == first


@pytest.mark.parametrize("content", [b"\xff\xfe", b"<!doctype html>"])
def test_invalid_card_is_refused(loradiag, tmp_path, content):
    card = tmp_path / "README.md"
    card.write_bytes(content)
    ran = loradiag("report", SPECTRUM, "--to", "hub", "--project", tmp_path)
    assert (ran.code, card.read_bytes(), "README.md" in ran.err) == (2, content, True)
    (tmp_path / "other").write_text("mine")
    card.unlink()
    card.symlink_to(tmp_path / "other")
    assert loradiag("report", SPECTRUM, "--to", "hub", "--project", tmp_path).code == 2
    assert (tmp_path / "other").read_text() == "mine"


def test_hub_commits_the_card(monkeypatch):
    hub = pytest.importorskip("huggingface_hub")
    sent = {}

    def missing(*_args, **_more):
        raise hub.errors.EntryNotFoundError("no README.md")

    monkeypatch.setattr(hub, "hf_hub_download", missing)
    monkeypatch.setattr(
        hub.HfApi, "upload_file", lambda self, **given: sent.update(given) or "commit"
    )
    assert track([SPECTRUM], "hub", "org/model") == "commit"
    assert (sent["repo_id"], sent["path_in_repo"]) == ("org/model", "README.md")
    assert b"C(16)" in sent["path_or_fileobj"]


def test_tracker_must_be_known_and_installed(monkeypatch):
    with pytest.raises(UsageError, match="nonsense"):
        track([SPECTRUM], "nonsense")
    with pytest.raises(UsageError, match="--project"):
        track([SPECTRUM], "hub")
    monkeypatch.setitem(__import__("sys").modules, "wandb", None)
    with pytest.raises(InputError, match=r"\.\[wandb\]"):
        track([SPECTRUM], "wandb")


def test_tensorboard_reads_what_was_sent(tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    track([SPECTRUM], "tensorboard", str(tmp_path))
    read = EventAccumulator(str(tmp_path))
    read.Reload()
    payload = payload_of([SPECTRUM])
    assert set(read.Tags()["scalars"]) == set(payload.scalars)
    (event,) = read.Scalars("spectrum/energy.16")
    assert event.value == pytest.approx(payload.scalars["spectrum/energy.16"])
    assert set(read.Tags()["images"]) == set(payload.figures)


@pytest.mark.slow
def test_wandb_writes_an_offline_run(tmp_path, monkeypatch):
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_DIR", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    track([SPECTRUM], "wandb", "checks")
    run = next(tmp_path.glob("wandb/offline-run-*"))
    assert b"spectrum/energy.16" in next(run.glob("*.wandb")).read_bytes()
    media = {path.suffix for path in (run / "files" / "media").rglob("*") if path.is_file()}
    assert {".png", ".html", ".json"} <= media


@pytest.mark.slow
def test_mlflow_reads_what_was_sent(tmp_path, monkeypatch):
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    mlflow = pytest.importorskip("mlflow")
    monkeypatch.chdir(tmp_path)
    mlflow.set_tracking_uri((tmp_path / "runs").as_uri())
    track([SPECTRUM], "mlflow", "checks")
    (run,) = mlflow.search_runs(experiment_names=["checks"], output_format="list")
    payload = payload_of([SPECTRUM])
    assert run.data.metrics["spectrum/energy.16"] == pytest.approx(
        payload.scalars["spectrum/energy.16"]
    )
    kept = Path(mlflow.artifacts.download_artifacts(run_id=run.info.run_id))
    assert json.loads((kept / "spectrum.json").read_text())["layer"]
    assert (kept / "report.html").is_file()


@pytest.mark.slow
def test_trackio_keeps_a_run(tmp_path, monkeypatch):
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path))
    trackio = pytest.importorskip("trackio")
    assert "checks" in track([SPECTRUM], "trackio", "checks")
    assert trackio.__version__
    assert list(tmp_path.rglob("*.db"))


def test_report_to_a_folder_by_the_command(loradiag, tmp_path):
    ran = loradiag("report", SPECTRUM, "--to", "hub", "--project", tmp_path)
    assert (ran.code, ran.out) == (0, "")
    assert (tmp_path / "README.md").exists()
    assert loradiag("report", SPECTRUM, "--project", "x").code == 2
    assert loradiag("report", SPECTRUM, "--to", "nowhere").code == 2
    ran = loradiag(
        "report", SPECTRUM, "--to", "hub", "--project", tmp_path, "-o", "x.html"
    )  # it would not be written
    assert (ran.code, "-o" in ran.err) == (2, True)
