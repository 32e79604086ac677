"""Runs of a program that serves adapters, each in a process of its own: its outputs with an
adapter, or without one.

    PYTHON programs.py PROGRAM

Imports what the program needs, prints its version, and reads jobs from standard input, one JSON
object per line: ``model``; ``adapter``, or null; ``inputs``, the tokens of each passage;
``weights``, a file of weights that replace those of the model, or null; ``out``, the .npy file to
write; ``log``, the file for messages. Each job runs in a forked process, so that an abort ends only
this job; its exit code is printed, below 0 the signal. Imports nothing of this project, so that
PYTHON may belong to another environment.
"""

import importlib
import json
import os
import sys
import traceback
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

Job = dict[str, Any]
Outputs = list[np.ndarray]


def run_peft(job: Job) -> Outputs:
    """Return the logits of transformers, with an adapter loaded by PEFT."""
    import torch
    from peft import PeftModel
    from safetensors.torch import load_file
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(job["model"], dtype=torch.float32)
    if job["weights"]:
        unexpected = model.load_state_dict(load_file(job["weights"]), strict=False).unexpected_keys
        assert not unexpected, unexpected
    if job["adapter"]:
        model = PeftModel.from_pretrained(model, job["adapter"])
    with torch.no_grad():
        return [model.eval()(torch.tensor([tokens])).logits[0].numpy() for tokens in job["inputs"]]


def run_llamacpp(job: Job) -> Outputs:
    """Return the logits of llama.cpp, with keys and values in float32 and the adapter at its
    default weight of 1.
    """
    from llama_cpp_py_sync import Llama

    llama = Llama(job["model"], n_ctx=64, n_batch=64, n_threads=1, type_k="f32", type_v="f32")
    lib, ffi, context = llama._lib, llama._ffi, llama._ctx
    if job["adapter"]:
        adapter = lib.llama_adapter_lora_init(llama._model, job["adapter"].encode())
        if adapter == ffi.NULL:
            raise SystemExit("llama_adapter_lora_init failed")
        if lib.llama_set_adapters_lora(
            context,
            ffi.new("struct llama_adapter_lora *[]", [adapter]),
            1,
            ffi.new("float[]", [1.0]),
        ):
            raise SystemExit("llama_set_adapters_lora failed")
    outputs = []
    for tokens in job["inputs"]:
        lib.llama_memory_clear(lib.llama_get_memory(context), True)
        batch = lib.llama_batch_init(len(tokens), 0, 1)
        batch.n_tokens = len(tokens)
        for at, token in enumerate(tokens):
            batch.token[at], batch.pos[at], batch.n_seq_id[at], batch.logits[at] = token, at, 1, 1
            batch.seq_id[at][0] = 0
        if lib.llama_decode(context, batch):
            raise SystemExit("llama_decode failed")
        values = ffi.buffer(lib.llama_get_logits(context), len(tokens) * llama.n_vocab * 4)
        outputs.append(np.frombuffer(values, np.float32).reshape(len(tokens), -1).copy())
    return outputs


def quantize_llamacpp(job: Job) -> Outputs:
    """Write ``model`` in Q4_0 as ``out``, a GGUF file."""
    from llama_cpp_py_sync._cffi_bindings import get_ffi, get_lib

    lib, options = get_lib(), get_lib().llama_model_quantize_default_params()
    options.ftype, options.nthread = 2, 1  # LLAMA_FTYPE_MOSTLY_Q4_0
    pointer = get_ffi().new("llama_model_quantize_params *", options)
    if lib.llama_model_quantize(job["model"].encode(), job["out"].encode(), pointer):
        raise SystemExit("llama_model_quantize failed")
    return []


def run_mlx(job: Job) -> Outputs:
    """Return the logits of mlx-lm."""
    import mlx.core as mx
    from mlx_lm.tuner.utils import load_adapters
    from mlx_lm.utils import load_model

    model, _ = load_model(Path(job["model"]))
    if job["adapter"]:
        load_adapters(model, job["adapter"])
    model.eval()
    return [np.array(model(mx.array([tokens]))[0].astype(mx.float32)) for tokens in job["inputs"]]


def run_diffusers(job: Job) -> Outputs:
    """Return the outputs of the model, a U-Net or a text encoder: the adapter is loaded into a
    pipeline of both.
    """
    import torch
    from diffusers import StableDiffusionPipeline, StableDiffusionXLPipeline, UNet2DConditionModel
    from safetensors.torch import load_file
    from transformers import CLIPTextModel, CLIPTextModelWithProjection

    folder, name = Path(job["model"]).parent, Path(job["model"]).name
    unet = UNet2DConditionModel.from_pretrained(folder / "unet")
    encoder = CLIPTextModel.from_pretrained(folder / "text_encoder")
    second = CLIPTextModelWithProjection.from_pretrained(folder / "text_encoder_2")
    model = {"unet": unet, "text_encoder": encoder, "text_encoder_2": second}[name]
    if job["weights"]:
        unexpected = model.load_state_dict(load_file(job["weights"]), strict=False).unexpected_keys
        assert not unexpected, unexpected
    parts = dict.fromkeys(("vae", "tokenizer", "scheduler", "safety_checker", "feature_extractor"))
    if model is second:
        parts = {
            "vae": None,
            "tokenizer": None,
            "tokenizer_2": None,
            "scheduler": None,
            "add_watermarker": False,
        }
        pipeline = StableDiffusionXLPipeline(
            unet=unet, text_encoder=encoder, text_encoder_2=second, **parts
        )
    else:
        pipeline = StableDiffusionPipeline(
            unet=unet, text_encoder=encoder, requires_safety_checker=False, **parts
        )
    if job["adapter"]:
        before = sum(parameter.numel() for parameter in model.parameters())
        pipeline.load_lora_weights(
            Path(job["adapter"]).parent, weight_name=Path(job["adapter"]).name
        )
        if sum(parameter.numel() for parameter in model.parameters()) == before:
            raise SystemExit("load_lora_weights added nothing")
    seeded, size = torch.Generator().manual_seed(0), unet.config.sample_size
    outputs = []
    with torch.no_grad():
        for step in (1, 300, 700):
            noise = torch.randn(1, unet.config.in_channels, size, size, generator=seeded)
            context = torch.randn(1, 5, unet.config.cross_attention_dim, generator=seeded)
            tokens = torch.randint(encoder.config.vocab_size, (1, 12), generator=seeded)
            if model is unet:
                outputs.append(model.eval()(noise, step, context).sample[0].numpy())
            else:
                outputs.append(model.eval()(tokens).last_hidden_state[0].numpy())
    return outputs


# Name -> function, its package, and modules to import before the first job.
PROGRAMS: dict[str, tuple[Callable[[Job], Outputs], str, tuple[str, ...]]] = {
    "peft": (run_peft, "peft", ("peft", "transformers.models.llama.modeling_llama")),
    "llama.cpp": (run_llamacpp, "llama-cpp-py-sync", ("llama_cpp_py_sync",)),
    "quantize": (quantize_llamacpp, "llama-cpp-py-sync", ("llama_cpp_py_sync",)),
    "mlx-lm": (run_mlx, "mlx-lm", ("mlx_lm.tuner.utils", "mlx_lm.utils")),
    "diffusers": (run_diffusers, "diffusers", ("diffusers", "peft")),
}


def run(program: Callable[[Job], Outputs], job: Job) -> int:
    """Run a job in a forked process; return its exit code."""
    child = os.fork()
    if not child:
        with Path(job["log"]).open("w") as log:
            os.dup2(log.fileno(), 1)
            os.dup2(log.fileno(), 2)
        try:
            if outputs := program(job):
                np.save(job["out"], np.stack(outputs))
        except BaseException:
            traceback.print_exc()
            sys.stderr.flush()
            os._exit(1)
        os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


if __name__ == "__main__":
    function, package, modules = PROGRAMS[sys.argv[1]]
    for module in modules:
        importlib.import_module(module)
    # The last part of the version of llama-cpp-py-sync is the build of llama.cpp.
    print(
        version(package).replace("0.", "b") if package.startswith("llama") else version(package),
        flush=True,
    )
    for line in sys.stdin:
        print(run(function, json.loads(line)), flush=True)
