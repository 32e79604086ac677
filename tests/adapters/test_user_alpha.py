"""α that a user states, for files that give none."""

import json

import numpy as np
import pytest

from lora_diag.adapters import open_adapter
from lora_diag.adapters.source import get_stated_alpha
from lora_diag.decisions.allocate.run import _count_params
from lora_diag.diagnostics.portability.measure import make_portable, portability
from lora_diag.errors import InputError, UsageError
from lora_diag.probes.curvature import CurvatureOptions
from lora_diag.probes.outputs import OutputsOptions
from lora_diag.probes.truncation import TruncationOptions
from lora_diag.running.probing import ProbeRun
from tests.adapters.making import adapter, base, close, dense, normal, write

A, B, C, D = normal(2, 5), normal(6, 2), normal(3, 5, seed=1), normal(6, 3, seed=1)


def stated(path, given):
    """ΔW of each layer with a stated α, and the notes."""
    opened = open_adapter(path, given)
    pairing, notes = opened.pair(None)
    return {delta.layer: dense(delta) for delta in pairing.deltas}, " ".join(notes)


def kohya(tmp_path, **extra):
    tensors = {"lora_unet_a.lora_down.weight": A, "lora_unet_a.lora_up.weight": B}
    tensors |= {"lora_unet_b.lora_down.weight": C, "lora_unet_b.lora_up.weight": D}
    return write(tmp_path / "lora.safetensors", {**tensors, **extra})


@pytest.mark.parametrize(("given", "scales"), [(None, (1, 1)), ("rank", (1, 1)), (8.0, (4, 8 / 3))])
def test_kohya_and_diffusers_files_without_alpha(tmp_path, given, scales):
    files = [kohya(tmp_path)]
    names = {"unet.a": (A, B), "unet.b": (C, D)}
    tensors = {f"{name}.lora_A.weight": pair[0] for name, pair in names.items()}
    tensors |= {f"{name}.lora_B.weight": pair[1] for name, pair in names.items()}
    files.append(write(tmp_path / "d" / "pytorch_lora_weights.safetensors", tensors))
    for file in files:
        result, notes = stated(file, given)
        for change, scale, pair in zip(result.values(), scales, names.values(), strict=True):
            close(change, scale * pair[1] @ pair[0])
        assert ("was given" in notes) == (given is not None)
        assert "give no alpha" in notes


def test_alpha_in_file_is_used(tmp_path):
    path = kohya(tmp_path, **{"lora_unet_a.alpha": np.array(3.0)})
    result, _ = stated(path, 8.0)
    close(result["lora_unet_a.weight"], 1.5 * B @ A)
    close(result["lora_unet_b.weight"], 8 / 3 * D @ C)
    whole = kohya(
        tmp_path, **{"lora_unet_a.alpha": np.array(3.0), "lora_unet_b.alpha": np.array(3.0)}
    )
    assert "is not used" in stated(whole, 8.0)[1]


@pytest.mark.parametrize(("given", "scales"), [("rank", (1, 1)), (8.0, (4, 8 / 3))])
def test_peft_file_without_its_config(tmp_path, given, scales):
    tensors = {
        "h.a.lora_A.weight": A,
        "h.a.lora_B.weight": B,
        "h.b.lora_A.weight": C,
        "h.b.lora_B.weight": D,
    }
    folder = adapter(tmp_path, tensors)
    (folder / "adapter_config.json").unlink()
    with pytest.raises(InputError, match="give --alpha"):
        open_adapter(folder)
    result, notes = stated(folder, given)
    close(result["h.a.weight"], scales[0] * B @ A)
    close(result["h.b.weight"], scales[1] * D @ C)
    assert "was given" in notes
    options = {"alpha_is_rank": True} if given == "rank" else {"alpha": given}
    assert {record.status for record in portability(folder, **options)} == {"refused"}
    written = make_portable(
        folder, tmp_path / "out", consumers=["peft", "vllm", "llamacpp"], **options
    )
    assert {record.status for record in written} == {"exact"}
    after, _ = stated(tmp_path / "out", None)
    close(after["h.b.weight"], scales[1] * D @ C)


def peft(folder):
    adapter(folder, {"h.a.lora_A.weight": A, "h.a.lora_B.weight": B})
    config = json.loads((folder / "adapter" / "adapter_config.json").read_text())
    del config["lora_alpha"]
    return folder / "adapter", config


def mlx(folder):
    write(folder / "mlx" / "adapters.safetensors", {"h.a.lora_a": A.T, "h.a.lora_b": B.T})
    return folder / "mlx", {"fine_tune_type": "lora", "lora_parameters": {"rank": 2}}


@pytest.mark.parametrize("make", [peft, mlx])
@pytest.mark.parametrize(("given", "scale"), [("rank", 1), (8.0, 4)])
def test_config_without_alpha(tmp_path, make, given, scale):
    folder, config = make(tmp_path)
    (folder / "adapter_config.json").write_text(json.dumps(config))
    with pytest.raises(InputError, match=r"lora_alpha|has no scale"):
        open_adapter(folder)
    close(stated(folder, given)[0]["h.a.weight"], scale * B @ A)
    (folder / "adapter_config.json").unlink()
    close(stated(folder, given)[0]["h.a.weight"], scale * B @ A)


@pytest.mark.parametrize(
    "options", [{"alpha": 0.0}, {"alpha": float("nan")}, {"alpha": 2.0, "alpha_is_rank": True}]
)
def test_alpha_without_effect_is_refused(options):
    with pytest.raises(UsageError, match="--alpha"):
        get_stated_alpha(options)


def test_commands_record_stated_alpha(tmp_path, loradiag):
    kohya(tmp_path)
    base(tmp_path, {"a.weight": normal(6, 5), "b.weight": normal(6, 5, seed=3)})
    norms = {}
    for words in ((), ("--alpha", "8"), ("--alpha-is-rank",)):
        ran = loradiag("spectrum", "base", "lora.safetensors", "--json", *words)
        assert ran.code == 0, ran.err
        norms[words] = next(
            record["fro"] for record in ran.records if record.get("layer") == "a.weight"
        )
        settings = ran.records[0]["settings"]
        recorded = {f"--{key.replace('_', '-')}" for key in settings if key.startswith("alpha")}
        assert recorded == set(words[:1])
    assert norms["--alpha", "8"] == pytest.approx(4 * norms[()])
    assert norms["--alpha-is-rank",] == norms[()]
    for command in ("inspect", "fleet", "portability"):
        assert loradiag(command, "lora.safetensors", "--alpha", "8").code == 0
    ran = loradiag(
        "extract", "base", "lora.safetensors", "--rank", "2", "-o", "out", "--alpha", "8"
    )
    assert ran.code == 0, ran.err
    ran = loradiag(
        "residual", "base", "lora.safetensors", "out", "--alpha", "8", "--json", "--layers", "^a"
    )
    (record,) = [record for record in ran.records if record["record"] == "residual"]
    assert record["epsilon"] == pytest.approx(0, abs=1e-5)
    assert (
        loradiag("spectrum", "base", "lora.safetensors", "--alpha", "1", "--alpha-is-rank").code
        == 2
    )


@pytest.mark.parametrize("options", [TruncationOptions, OutputsOptions, CurvatureOptions])
def test_probes_scale_adapters_by_stated_alpha(tmp_path, options):
    file = kohya(tmp_path)
    folder = base(tmp_path, {"a.weight": normal(6, 5), "b.weight": normal(6, 5, seed=3)})
    for given, scale in (({}, 1.0), ({"alpha": 8.0}, 4.0), ({"alpha_is_rank": True}, 1.0)):
        run = ProbeRun("probe", given, options)
        result = {delta.layer: dense(delta) for delta in run.compare(folder, file).pairing.deltas}
        close(result["a.weight"], scale * B @ A)


def test_gate_recognises_adapter_of_stated_alpha(tmp_path, loradiag):
    """The fingerprint is that of the files, whatever was stated of them; a changed file is another
    one.
    """
    tensors = {"h.a.lora_A.weight": A, "h.a.lora_B.weight": B}
    folder = adapter(tmp_path, tensors)
    (folder / "adapter_config.json").unlink()
    base(tmp_path, {"h.a.weight": normal(6, 5)})
    assert loradiag("spectrum", "base", "adapter", "--alpha", "8", "-o", "s.jsonl").code == 0
    (tmp_path / "gate.toml").write_text('[[rule]]\nname = "there"\nrequire = "spectrum.fro > 0"\n')
    ran = loradiag("gate", "gate.toml", "s.jsonl", "--for", "base", "--for", "adapter")
    assert ran.code == 0, ran.out + ran.err
    doubled = {f"base_model.model.{name}": 2 * value for name, value in tensors.items()}
    write(folder / "adapter_model.safetensors", doubled)
    assert loradiag("gate", "gate.toml", "s.jsonl", "--for", "base", "--for", "adapter").code != 0


def test_allocate_matches_an_adapter_without_alpha(tmp_path):
    folder = adapter(tmp_path, {"h.a.lora_A.weight": A, "h.a.lora_B.weight": B})
    (folder / "adapter_config.json").unlink()
    assert _count_params(folder) == 2 * (5 + 6)
