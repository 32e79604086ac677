"""Recorded gradients against autograd: in a real Trainer with real PEFT, and in loops
of one's own.
"""

import contextlib
import copy
import math
import os
import warnings
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors import safe_open
from safetensors.torch import load_file
from torch import nn
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)

import lora_diag
from lora_diag.catalog import read_results
from lora_diag.diagnostics.overlap.recorder import GradientRecorder
from lora_diag.errors import UsageError
from tests.conftest import ROOT, as_numpy
from tests.linalg.test_subspace import dense_overlaps
from tests.messages import assert_names, raises_naming
from tests.served import Server

VOCABULARY = 24

# PEFT asks transformers in words that the newest transformers has deprecated.
pytestmark = pytest.mark.filterwarnings(
    "ignore:.*deprecated and will be removed in v6:FutureWarning"
)


def llama(**settings) -> LlamaForCausalLM:
    torch.manual_seed(0)
    sizes = {
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
    }
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        num_key_value_heads=1,
        max_position_embeddings=32,
        **sizes,
        **settings,
    )
    return LlamaForCausalLM(config)


def gpt2() -> GPT2LMHeadModel:
    still = dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), 0.0)
    return GPT2LMHeadModel(
        GPT2Config(vocab_size=VOCABULARY, n_positions=16, n_embd=8, n_layer=1, n_head=2, **still)
    )


def with_lora(model, targets=("q_proj", "down_proj"), **settings):
    torch.manual_seed(1)
    peft = get_peft_model(
        model, LoraConfig(r=3, lora_alpha=6, target_modules=list(targets), **settings)
    )
    with torch.no_grad():
        for name, parameter in peft.named_parameters():
            if "lora_" in name and "magnitude" not in name:
                parameter.normal_(std=0.3)
    return peft


def batch(seed: int, size: int = 2) -> dict[str, torch.Tensor]:
    ids = torch.randint(VOCABULARY, (size, 8), generator=torch.Generator().manual_seed(seed))
    return {"input_ids": ids, "labels": ids}


def trainer_of(model, folder, callbacks, **settings) -> Trainer:
    defaults = {
        "per_device_train_batch_size": 2,
        "max_steps": 3,
        "report_to": "none",
        "use_cpu": True,
        "logging_steps": 1,
        "save_strategy": "no",
        "disable_tqdm": True,
        "learning_rate": 0.05,
        "max_grad_norm": 0.0,
        "gradient_accumulation_steps": 2,
    }
    arguments = TrainingArguments(output_dir=str(folder / "trainer"), **defaults | settings)
    data = [{name: value[0] for name, value in batch(i, 1).items()} for i in range(16)]
    return Trainer(model=model, args=arguments, train_dataset=data, callbacks=callbacks)


def train(*args, **settings) -> None:
    trainer_of(*args, **settings).train()


def saved(folder, step) -> dict[str, torch.Tensor]:
    return load_file(folder / f"grad_step{step:06d}.safetensors")


class ProgressReporter(TrainerCallback):
    """Keeps all gradients and weights as they are when the recorder looks."""

    def __init__(self):
        self.seen = {}

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        self.seen[state.global_step] = {
            name: (
                parameter.detach().clone(),
                None if parameter.grad is None else parameter.grad.clone(),
            )
            for name, parameter in model.named_parameters()
        }


def test_recorder_records_optimizer_gradients(tmp_path):
    watch = ProgressReporter()
    train(llama(), tmp_path, [GradientRecorder(tmp_path / "g", every=2), watch])
    assert sorted(path.name for path in (tmp_path / "g").iterdir()) == [
        "grad_step000000.safetensors",
        "grad_step000002.safetensors",
    ]
    for step in (0, 2):
        grads = saved(tmp_path / "g", step)
        expected = {
            name: grad for name, (value, grad) in watch.seen[step].items() if value.ndim == 2
        }
        assert set(grads) == set(expected)
        for name, grad in expected.items():
            assert torch.equal(grads[name], grad)
    with safe_open(tmp_path / "g" / "grad_step000002.safetensors", "pt") as file:
        assert file.metadata() == {"step": "2", "kind": "gradient", "clipped": "no"}


def test_clipping_scales_gradients_by_one_factor_and_is_noted(tmp_path):
    for folder, most in (("free", 0.0), ("clipped", 0.01)):
        train(llama(), tmp_path, [GradientRecorder(tmp_path / folder, every=9)], max_grad_norm=most)
    free, clipped = saved(tmp_path / "free", 0), saved(tmp_path / "clipped", 0)
    ratios = [float(clipped[name].norm() / free[name].norm()) for name in free]
    assert max(ratios) == pytest.approx(min(ratios), rel=1e-4)
    assert max(ratios) < 0.1
    with safe_open(tmp_path / "clipped" / "grad_step000000.safetensors", "pt") as file:
        assert file.metadata()["clipped"].startswith("trained weights: yes")


def unfrozen(model, loss_of) -> dict[str, torch.Tensor]:
    """What autograd says when the frozen weights are trained."""
    model = copy.deepcopy(model)
    for parameter in model.parameters():
        parameter.requires_grad_(True)
    loss_of(model)
    return {name: parameter.grad for name, parameter in model.named_parameters()}


def record(model, loss_of, folder, **settings) -> dict[str, torch.Tensor]:
    with GradientRecorder(folder, every=1, **settings).attach(model) as recorder:
        loss_of(model)
        recorder.step()
    return saved(folder, 0)


def accumulated(model):
    for seed in (1, 2):
        (model(**batch(seed)).loss / 2).backward()


@pytest.mark.parametrize(
    "make",
    [
        lambda: with_lora(llama()),
        lambda: with_lora(llama(), lora_dropout=0.0, modules_to_save=["lm_head"]),
        lambda: with_lora(llama(), ["embed_tokens"]),
        lambda: with_lora(llama(pad_token_id=3), ["embed_tokens"]),
        lambda: with_lora(llama(), use_rslora=True, bias="lora_only"),
        lambda: with_lora(gpt2(), ["c_attn"], fan_in_fan_out=True),
    ],
    ids=[
        "linear",
        "modules_to_save",
        "embedding",
        "embedding with padding",
        "rslora and bias",
        "conv1d",
    ],
)
def test_gradients_under_lora_equal_unfrozen_weights(tmp_path, make):
    model = make()
    model.train()
    result, expected = record(model, accumulated, tmp_path / "g"), unfrozen(model, accumulated)
    assert result
    for name, grad in result.items():
        path = f"base_model.model.{name.removesuffix('.weight')}"
        names = (f"{path}.base_layer.weight", f"{path}.modules_to_save.default.weight")
        truth = next(expected[name] for name in names if name in expected)
        assert float(truth.norm()) > 0
        assert torch.allclose(grad, truth, atol=1e-6), name


def test_gradient_checkpointing_counts_every_layer_once(tmp_path):
    for reentrant in (False, True):
        model = with_lora(llama())
        expected = record(model, accumulated, tmp_path / f"plain{reentrant}")
        model.enable_input_require_grads()
        model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        model.train()
        model.zero_grad()
        result = record(model, accumulated, tmp_path / f"checkpointed{reentrant}")
        for name, grad in expected.items():
            assert torch.allclose(result[name], grad, atol=1e-6), (reentrant, name)


@pytest.mark.parametrize("unscale", [False, True])
def test_loss_scale_is_divided_out(tmp_path, unscale):
    model = with_lora(llama(), modules_to_save=["lm_head"])
    expected = record(model, accumulated, tmp_path / "plain")
    model.zero_grad()
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    scaler = torch.amp.GradScaler("cpu", init_scale=4096.0)
    with GradientRecorder(tmp_path / "scaled", every=1).attach(model) as recorder:
        for seed in (1, 2):
            scaler.scale(model(**batch(seed)).loss / 2).backward()
        if unscale:
            scaler.unscale_(optimizer)
        recorder.step(scaler)
        scaler.step(optimizer)
        scaler.update()
    result = saved(tmp_path / "scaled", 0)
    assert "lm_head.weight" in result
    for name, grad in expected.items():
        assert torch.allclose(result[name], grad, rtol=1e-4, atol=1e-7), name


def test_bf16_autocast_gradient_has_bf16_accuracy(tmp_path):
    model = with_lora(llama())
    expected = record(model, accumulated, tmp_path / "plain")
    model.zero_grad()

    def mixed(model):
        with torch.autocast("cpu", torch.bfloat16):
            accumulated(model)

    result = record(model, mixed, tmp_path / "mixed", dtype="bfloat16")
    for name, grad in expected.items():
        assert result[name].dtype == torch.bfloat16
        assert float((result[name].float() - grad).norm() / grad.norm()) < 0.05


def test_gradients_equal_training_loop(tmp_path):
    model = llama()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with GradientRecorder(tmp_path / "g", every=2, layers="layers", exclude="mlp").attach(
        model, step=4
    ) as recorder:
        for seed in range(3):
            optimizer.zero_grad()
            model(**batch(seed)).loss.backward()
            recorder.step()
            optimizer.step()
    assert [path.name[9:15] for path in sorted((tmp_path / "g").iterdir())] == ["000004", "000006"]
    assert all("self_attn" in name for name in saved(tmp_path / "g", 4))


def test_live_overlaps_equal_saved_ones_and_reach_log(tmp_path):
    base, tuned = llama(), llama()
    with torch.no_grad():
        for parameter in tuned.parameters():
            parameter.add_(
                0.01 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(5))
            )
    base.save_pretrained(tmp_path / "base")
    tuned.save_pretrained(tmp_path / "tuned")
    reference = lora_diag.subspaces(tmp_path / "base", tmp_path / "tuned", ranks=[2, 4])
    recorder = GradientRecorder(tmp_path / "o.jsonl", every=2, reference=reference)
    trainer = trainer_of(base, tmp_path, [recorder, GradientRecorder(tmp_path / "g", every=2)])
    recorder.log_to(trainer)
    trainer.train()
    offline = lora_diag.overlap(
        tmp_path / "base", tmp_path / "tuned", [tmp_path / "g"], ranks=[2, 4]
    )
    live = read_results(tmp_path / "o.jsonl")
    assert live.end is not None
    expected = {(r.layer, r.step, r.rank): r for r in offline}
    assert len(live) == len(expected) == 16 * 2 * 2
    for record in live:
        other = expected[record.layer, record.step, record.rank]
        assert record.kappa == pytest.approx(other.kappa, abs=1e-12)
        assert record.tangent == pytest.approx(other.tangent, abs=1e-12)
    logged = [entry for entry in trainer.state.log_history if "overlap/r4/kappa" in entry]
    assert [entry["step"] for entry in logged] == [0, 2]
    kappas = [r.kappa for r in live if (r.step, r.rank) == (2, 4)]
    assert logged[1]["overlap/r4/kappa"] == pytest.approx(float(np.median(kappas)))
    assert "overlap/r4/kappa/self_attn.q_proj" in logged[1]


def test_live_subspaces_follow_current_lora(tmp_path, loradiag):
    torch.manual_seed(1)
    model = get_peft_model(
        llama(), LoraConfig(r=3, lora_alpha=6, target_modules=["q_proj", "down_proj"])
    )
    watch = ProgressReporter()
    recorders = [GradientRecorder(tmp_path / "o.jsonl", every=1, reference="live", ranks=[1, 8])]
    train(model, tmp_path, [*recorders, GradientRecorder(tmp_path / "g", every=1), watch])
    result = read_results(tmp_path / "o.jsonl")
    assert {(item.reason, item.detail[:6]) for item in result.left_out} == {
        ("no_reference", "step 0")
    }
    assert {record.step for record in result} == {1, 2}
    assert {record.rank for record in result} == {1, 3}
    for record in result:
        path = f"base_model.model.{record.layer.removesuffix('.weight')}"
        b, a = (
            as_numpy(watch.seen[record.step][f"{path}.lora_{x}.default.weight"][0]) for x in "BA"
        )
        gradient = as_numpy(saved(tmp_path / "g", record.step)[record.layer])
        for name, value in dense_overlaps(2 * b @ a, gradient, record.rank).items():
            assert getattr(record, name) == pytest.approx(value, abs=1e-6), name
    ran = loradiag("inspect", "o.jsonl")
    assert ran.code == 0
    assert "Containment" in ran.out


def test_non_finite_gradient_is_left_out_with_step(tmp_path):
    model = llama()
    model.save_pretrained(tmp_path / "base")
    tuned = llama()
    nn.init.normal_(tuned.lm_head.weight)
    tuned.save_pretrained(tmp_path / "tuned")
    reference = lora_diag.subspaces(tmp_path / "base", tmp_path / "tuned", ranks=[2])
    with GradientRecorder(tmp_path / "o.jsonl", every=1, reference=reference).attach(
        model
    ) as recorder:
        accumulated(model)
        model.lm_head.weight.grad[1, 1] = math.inf
        recorder.step()
    result = read_results(tmp_path / "o.jsonl")
    assert len(result) == 0
    details = {item.layer: item.detail for item in result.left_out}
    assert details["lm_head.weight"] == "step 0: the gradient holds inf at [1, 1]"
    assert details["model.embed_tokens.weight"] == "ΔW is zero, so it has no singular subspaces"


def test_exception_leaves_records_without_end_and_no_hooks(tmp_path):
    model = with_lora(llama())

    def broken():
        with GradientRecorder(tmp_path / "o.jsonl", every=1, reference="live").attach(
            model
        ) as recorder:
            accumulated(model)
            recorder.step()
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        broken()
    result = read_results(tmp_path / "o.jsonl")
    assert result.end is None
    assert len(result) == 4
    assert not any(module._forward_hooks for module in model.modules())


def test_unrecordable_parameter_is_reported(tmp_path, caplog):
    model = with_lora(llama(), use_dora=True)
    with pytest.raises(UsageError, match="nothing to record"):
        GradientRecorder(tmp_path / "g").attach(model)
    assert_names(caplog.text, "output", "W·x")
    with pytest.raises(UsageError, match="every=0"):
        GradientRecorder(tmp_path / "g", every=0)
    with pytest.raises(UsageError, match="float16"):
        GradientRecorder(tmp_path / "g", dtype="float16")
    with pytest.raises(UsageError, match="reference='dead'"):
        GradientRecorder(tmp_path / "g", reference="dead")
    with raises_naming(UsageError, "selected", "LoRA"):
        GradientRecorder(tmp_path / "o.jsonl", reference="live").attach(llama())
    with raises_naming(UsageError, "call step"):
        GradientRecorder(tmp_path / "g").attach(llama()).step()
    with pytest.raises(UsageError, match=r"ranks=\[0\]"):
        GradientRecorder(tmp_path / "o.jsonl", reference="live", ranks=[0])
    (tmp_path / "there.jsonl").write_text("")
    recorder, model = (
        GradientRecorder(tmp_path / "there.jsonl", reference="live"),
        with_lora(llama()),
    )
    with pytest.raises(UsageError, match="exists"):
        recorder.attach(model)
    (tmp_path / "there.jsonl").unlink()
    recorder.attach(model).close()
    reference = lora_diag.subspaces(
        ROOT / "sample_checkpoints/base", ROOT / "sample_checkpoints/lora_r4", ranks=[2]
    )
    with raises_naming(UsageError, "selected weight"):
        GradientRecorder(tmp_path / "o.jsonl", reference=reference).attach(llama())


def test_sharded_weights_are_refused(tmp_path):
    model = llama()
    model.lm_head.weight.ds_id = 7  # as DeepSpeed ZeRO-3 marks them
    with raises_naming(UsageError, "lm_head.weight", "sharded"):
        GradientRecorder(tmp_path / "g").attach(model)


def train_one_of_two(job: dict) -> None:
    warnings.simplefilter("ignore")
    rank, folder = int(job["words"][0]), Path(job["cwd"])
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2
    )
    model = nn.parallel.DistributedDataParallel(with_lora(llama(), modules_to_save=["lm_head"]))
    with GradientRecorder(folder / "g", every=1).attach(model) as recorder:
        model(**batch(rank + 1)).loss.backward()
        recorder.step()
    torch.distributed.barrier()
    os._exit(0)  # gloo now and then hangs while the other process takes its own end down


def test_two_processes_record_gradient_of_whole_batch_once(tmp_path, server):
    """DistributedDataParallel on gloo: a LoRA, an lm_head that is trained, each process with half
    of the batch.
    """
    environment = {
        **os.environ,
        "GLOO_SOCKET_IFNAME": "lo",
    }  # what the name of the machine resolves to may not answer
    prepare = "tests.diagnostics.overlap.test_recorder:train_one_of_two"

    def run(rank: int):
        (tmp_path / f"printed{rank}").mkdir()
        with contextlib.closing(Server(tmp_path / f"printed{rank}")) as own:
            return own.run([rank], tmp_path, environment=environment, prepare=prepare)

    with ThreadPoolExecutor(2) as both:
        for code, _, err in both.map(run, (0, 1)):
            assert code == 0, err
    expected = record(
        with_lora(llama(), modules_to_save=["lm_head"]), accumulated, tmp_path / "one"
    )
    result = saved(tmp_path / "g", 0)
    assert set(result) == set(expected)
    for name, grad in expected.items():
        assert torch.allclose(result[name], grad, atol=1e-6), name
