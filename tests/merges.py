"""Merges made on the spot by the installed PEFT on tiny models: base, adapter and merged
checkpoint, to be spoilt.
"""

import copy
import json
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

Tensors = dict[str, torch.Tensor]


@dataclass
class Merged:
    """Paths, and the tensors of base and merged."""

    base: Path
    adapter: Path
    merged: Path
    before: Tensors
    after: Tensors

    def spoil(self, change: Callable[[Tensors, Tensors], None], name: str = "spoilt") -> Path:
        """Write MERGED once more after ``change(before, after)`` had its way with a copy of its
        tensors.
        """
        after = {key: value.clone() for key, value in self.after.items()}
        change(self.before, after)
        return write(self.merged.parent / name, after)

    def delta(self, name: str) -> torch.Tensor:
        """ΔW of a layer from the saved factors, float64; PEFT's formula, by its own words."""
        factors = load_file(self.adapter / "adapter_model.safetensors")
        config = json.loads((self.adapter / "adapter_config.json").read_text())
        key = f"base_model.model.{name.removesuffix('.weight')}.lora_"
        return (
            factors[f"{key}B.weight"].double()
            @ factors[f"{key}A.weight"].double()
            * config["lora_alpha"]
            / config["r"]
        )


def write(folder: Path, tensors: Tensors, config: str | None = None) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    save_file(
        {name: value.contiguous().clone() for name, value in tensors.items()},
        folder / "model.safetensors",
    )
    if config is not None:
        (folder / "config.json").write_text(config)
    return folder


def llama(dtype=torch.float32, tied: bool = False, hidden: int = 32):
    import transformers

    config = transformers.LlamaConfig(
        vocab_size=40, hidden_size=hidden, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, tie_word_embeddings=tied,
    )  # fmt: skip
    torch.manual_seed(1)
    return transformers.LlamaForCausalLM(config).to(dtype)


def gpt2(dtype=torch.float32):
    import transformers

    torch.manual_seed(1)
    return transformers.GPT2LMHeadModel(
        transformers.GPT2Config(vocab_size=24, n_positions=16, n_embd=16, n_layer=2, n_head=2)
    ).to(dtype)


def mixtral(dtype=torch.float32):
    import transformers

    config = transformers.MixtralConfig(
        vocab_size=40, hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=2, num_local_experts=4,
    )  # fmt: skip
    torch.manual_seed(1)
    return transformers.MixtralForCausalLM(config).to(dtype)


def peft_merge(
    folder: Path, model, size: float = 0.05, safe: bool = False, autocast: bool = True, **config
) -> Merged:
    """Train an adapter at random, merge it with PEFT, and write all three.

    Args:
        folder: Where to.
        model: The base model.
        size: Standard deviation of what is added to every trained number.
        safe: PEFT's ``safe_merge``, which rounds ΔW before it adds it.
        autocast: Whether a bf16 model gets float32 factors, as PEFT does by default.
        config: Of the adapter: ``made``, or the fields of its ``kind``; r = 4 and alpha = 10 by
            default.
    """
    import peft

    made, kind = config.pop("made", None), config.pop("kind", peft.LoraConfig)
    if kind is peft.LoraConfig:
        config = {
            "r": 4,
            "lora_alpha": 10,
            "target_modules": ["q_proj", "v_proj", "up_proj"],
        } | config
    before = state(model)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        tuned = peft.get_peft_model(
            copy.deepcopy(model), made or kind(**config), autocast_adapter_dtype=autocast
        )
        torch.manual_seed(2)
        with torch.no_grad():
            for parameter in tuned.parameters():
                if parameter.requires_grad:
                    parameter.add_(torch.randn_like(parameter) * size)
        tuned.save_pretrained(folder / "adapter")
        after = state(tuned.merge_and_unload(safe_merge=safe))
    words = model.config.to_json_string() if hasattr(model, "config") else None
    return Merged(
        write(folder / "base", before, words),
        folder / "adapter",
        write(folder / "merged", after, words),
        before,
        after,
    )


def state(model) -> Tensors:
    """The tensors of a model as a checkpoint holds them: a tied head is not stored."""
    tensors = {name: value.detach().clone() for name, value in model.state_dict().items()}
    if getattr(getattr(model, "config", None), "tie_word_embeddings", False):
        tensors.pop("lm_head.weight", None)
    return tensors
