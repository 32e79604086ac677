"""Adapters with seeded factors: of PEFT and mlx-lm for a language model, of diffusers and kohya for
image models.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

SIZE = 0.02  # ‖ΔW‖ / ‖W‖
LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
EVEN = r"layers\.\d*[02468]\.(self_attn|mlp)\.\w+"
FIRST = {"layers_to_transform": list(range(8))}


@dataclass(frozen=True)
class Case:
    """An adapter of PEFT for the language model.

    Args:
        name: Its name in tables.
        config: Fields of its ``LoraConfig`` other than r = 8, α = 16 and all linear layers.
        bases: The models that it is made for: ``tied`` or ``untied`` head.
        fix: Option of ``--fix`` without which it cannot be written in another layout.
        size: ‖ΔW‖ / ‖W‖.
    """

    name: str
    config: Mapping[str, Any] = field(default_factory=dict)
    bases: tuple[str, ...] = ("tied",)
    fix: str = ""
    size: float = SIZE


BOTH = ("tied", "untied")
PLAIN, LARGE, PATTERNS = "plain", "plain, ‖ΔW‖ = 0.1 ‖W‖", "rank_pattern, alpha_pattern"
CASES = (
    Case(PLAIN, bases=BOTH),
    Case(LARGE, size=0.1),
    Case("rsLoRA", {"use_rslora": True}),
    Case("α = 64", {"lora_alpha": 64}),
    Case("rank_pattern", {"rank_pattern": {EVEN: 4}}),
    Case("alpha_pattern, anchored", {"alpha_pattern": {r"^model\.layers\.1\d\..*": 32}}),
    Case(PATTERNS, {"rank_pattern": {EVEN: 4}, "alpha_pattern": {EVEN: 8}}),
    Case("DoRA", {"use_dora": True, **FIRST}, fix="dora_to_lora"),
    Case("PiSSA", {"init_lora_weights": "pissa", "target_modules": ["q_proj", "v_proj"], **FIRST}),
    Case("modules_to_save: lm_head", {"modules_to_save": ["lm_head"]}, ("untied",), "leave_out"),
    Case("modules_to_save: norms", {"modules_to_save": ["input_layernorm"]}, fix="leave_out"),
    Case(
        "rows of embed_tokens",
        {"trainable_token_indices": [260, 282, 28]},
        ("untied",),
        "leave_out",
    ),
    Case("LoRA on embed_tokens", {"target_modules": [*LINEAR, "embed_tokens"]}, BOTH),
    Case("LoRA on lm_head", {"target_modules": [*LINEAR, "lm_head"]}, BOTH),
)


def make_peft(case: Case, base: Path, folder: Path) -> None:
    """Write an adapter of PEFT, every ΔW a fraction of its weight."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    config = {
        "r": 8,
        "lora_alpha": 16,
        "target_modules": LINEAR,
        "task_type": "CAUSAL_LM",
        **case.config,
    }
    model = get_peft_model(
        AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32), LoraConfig(**config)
    )
    seeded = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for _, module in model.named_modules():
            if hasattr(module, "lora_embedding_A"):
                _fill(module, case.size, seeded)
            if isinstance(
                saved := getattr(module, "modules_to_save", None), torch.nn.ModuleDict
            ) and len(saved):
                weight = saved["default"].weight
                weight += (
                    SIZE
                    * weight.square().mean().sqrt()
                    * torch.randn(weight.shape, generator=seeded)
                )
        for name, rows in model.named_parameters():
            if "trainable_tokens_delta" in name:
                rows += SIZE * torch.randn(rows.shape, generator=seeded)
    model.save_pretrained(folder)


def _fill(module: Any, relative: float, seeded: torch.Generator) -> None:
    """Fill the factors of a LoRA layer; those that PiSSA filled, and magnitudes of DoRA, change by
    5%.
    """
    table = "default" in module.lora_embedding_A
    a = module.lora_embedding_A["default"] if table else module.lora_A["default"].weight
    b = module.lora_embedding_B["default"] if table else module.lora_B["default"].weight
    if not table and b.any():
        b *= 1 + 0.05 * torch.randn(b.shape, generator=seeded)
        return
    a.copy_(torch.randn(a.shape, generator=seeded))
    b.copy_(torch.randn(b.shape, generator=seeded))
    b *= (
        relative
        * module.get_base_layer().weight.norm()
        / (b @ a).norm()
        / module.scaling["default"]
    )
    if module.lora_magnitude_vector:
        magnitude = module.lora_magnitude_vector["default"].weight
        magnitude *= 1 + 0.05 * torch.randn(magnitude.shape, generator=seeded)


Tensors = dict[str, Tensor]


def random_pair(
    weight: Tensor, rank: int, seeded: torch.Generator, scale: float = 1.0
) -> tuple[Tensor, Tensor]:
    """Return B and A with ‖scale·B·A‖ = ``SIZE``·‖W‖, for a convolution with its kernel in A."""
    flat = weight.flatten(1)
    a = torch.randn(rank, flat.shape[1], generator=seeded)
    b = torch.randn(len(flat), rank, generator=seeded)
    return b * (SIZE * flat.norm() / (b @ a).norm() / scale), a


INSIDE = [f"{'mlp' if name in LINEAR[4:] else 'self_attn'}.{name}" for name in LINEAR]
SCALE = 20.0
TABLE, HEAD = "model.embed_tokens", "lm_head"


def mlx_adapters(base: Path, folder: Path, tied: bool) -> dict[str, Path]:
    """Write adapters as mlx-lm writes them, for a model with a tied head or another; return them by
    name.
    """
    weights = load_file(base / "model.safetensors")
    blocks = json.loads((base / "config.json").read_text())["num_hidden_layers"]
    last = range(blocks - 4, blocks)
    seeded = torch.Generator().manual_seed(1)

    def write(
        name: str,
        modules: Iterable[str],
        keys: list[str] | None = INSIDE,
        num_layers: int | None = 4,
        rank: int = 8,
        ranks: Mapping[str, int] | None = None,
        kind: str = "lora",
    ) -> None:
        tensors: Tensors = {}
        for module in modules:
            weight = weights[f"{TABLE if tied and module == HEAD else module}.weight"]
            b, a = random_pair(weight, (ranks or {}).get(module, rank), seeded, SCALE)
            tensors |= {f"{module}.lora_a": b, f"{module}.lora_b": a} if module == TABLE else {}
            tensors |= {f"{module}.lora_a": a.T, f"{module}.lora_b": b.T} if module != TABLE else {}
            if kind == "dora":
                m = weight.norm(dim=1)
                tensors[f"{module}.m"] = m * (1 + 0.05 * torch.randn(m.shape, generator=seeded))
        settings: dict[str, Any] = {"rank": rank, "scale": SCALE, "dropout": 0.0}
        settings |= {} if keys is None else {"keys": keys}
        config = {"fine_tune_type": kind, "lora_parameters": settings}
        config |= {} if num_layers is None else {"num_layers": num_layers}
        path = folder / name.replace(" ", "_")
        path.mkdir(parents=True)
        save_file(
            {key: tensor.contiguous() for key, tensor in tensors.items()},
            path / "adapters.safetensors",
        )
        (path / "adapter_config.json").write_text(json.dumps(config))
        written[name] = path

    written: dict[str, Path] = {}
    everywhere = [f"model.layers.{n}.{module}" for n in range(blocks) for module in INSIDE]
    late = [f"model.layers.{n}.{module}" for n in last for module in INSIDE]
    write("LoRA on embed_tokens", [*late, TABLE], [*INSIDE, TABLE])
    write("LoRA on lm_head", [*late, HEAD], [*INSIDE, HEAD])
    if not tied:
        return written
    write("scale = 20", everywhere, num_layers=-1)
    write("last 4 blocks, no keys", late, keys=None)
    write("factors outside num_layers", everywhere)
    write("factors outside keys", late, keys=INSIDE[:4])
    write("no factors for one module", late[1:])
    write("no num_layers", late, num_layers=None)
    write("unequal ranks", late, ranks={late[0]: 4})
    write("DoRA", late, kind="dora")
    return written


def make_unet(folder: Path) -> None:
    """Write a U-Net of two blocks with attention."""
    from diffusers import UNet2DConditionModel

    torch.manual_seed(0)
    sizes = {
        "sample_size": 8,
        "layers_per_block": 1,
        "block_out_channels": (32, 64),
        "norm_num_groups": 8,
    }
    down, up = ("CrossAttnDownBlock2D", "DownBlock2D"), ("UpBlock2D", "CrossAttnUpBlock2D")
    kinds = {"down_block_types": down, "up_block_types": up}
    UNet2DConditionModel(
        cross_attention_dim=32, attention_head_dim=8, **sizes, **kinds
    ).save_pretrained(folder)


def make_text_encoder(folder: Path, second: bool) -> None:
    """Write a text encoder of two blocks, as the first or the second of a pipeline."""
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    torch.manual_seed(1)
    sizes = {
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
    }
    config = CLIPTextConfig(vocab_size=100, max_position_embeddings=16, **sizes)
    (CLIPTextModelWithProjection if second else CLIPTextModel)(config).save_pretrained(folder)


def image_adapters(unet: Path, encoder: Path, folder: Path) -> dict[str, Path]:
    """Write adapters of a U-Net or text encoder as kohya's scripts, LyCORIS and diffusers do;
    return them by name.
    """
    weights = load_file(unet / "diffusion_pytorch_model.safetensors") | load_file(
        encoder / "model.safetensors"
    )
    linear = [
        name for name in weights if name.endswith(("to_q.weight", "to_k.weight", "to_v.weight"))
    ]
    text = [
        name
        for name in weights
        if name.endswith(("_proj.weight", "fc1.weight", "fc2.weight")) and "layers" in name
    ]
    convolutions = [name for name in weights if name.endswith(("conv1.weight", "conv2.weight"))]
    seeded = torch.Generator().manual_seed(2)
    written: dict[str, Path] = {}

    def ranks_of(at: int) -> int:
        return 4 if at % 3 else 8

    def kohya(
        name: str,
        rank: Callable[[int], int],
        alpha: Callable[[int], float | None],
        keys: Any = linear,
        **more: Any,
    ) -> None:
        tensors: Tensors = {}
        for at, key in enumerate(keys):
            component = (
                f"lora_{more.get('encoder', 'te')}_text_model" if key in text else "lora_unet"
            )
            module = f"{component}_{key.removesuffix('.weight').replace('.', '_')}"
            b, a = random_pair(weights[key], rank(at), seeded)
            kernel = weights[key].shape[1:]
            tensors[f"{module}.lora_up.weight"] = b.reshape(*b.shape, *(1 for _ in kernel[1:]))
            tensors[f"{module}.lora_down.weight"] = a.reshape(-1, *kernel)
            if (number := alpha(at)) is not None:
                tensors[f"{module}.alpha"] = torch.tensor(float(number))
            if more.get("dora"):
                tensors[f"{module}.dora_scale"] = weights[key].norm(dim=1, keepdim=True) * 1.05
        save(name, tensors)

    def diffusers(
        name: str,
        rank: Callable[[int], int],
        metadata: dict[str, Any] | None = None,
        keys: Iterable[str] = linear,
        parts: tuple[str, str] = ("lora_B", "lora_A"),
        alpha: float | None = None,
    ) -> None:
        tensors: Tensors = {}
        for at, key in enumerate(keys):
            module = f"{'text_encoder.text_model' if key in text else 'unet'}.{key.removesuffix('.weight')}"
            names = parts if key in text else ("lora_B", "lora_A")
            pair = random_pair(weights[key], rank(at), seeded)
            tensors |= {
                f"{module}.{part}.weight": factor for part, factor in zip(names, pair, strict=True)
            }
            tensors |= {f"{module}.alpha": torch.tensor(alpha)} if alpha else {}
        save(name, tensors, {"lora_adapter_metadata": json.dumps(metadata)} if metadata else None)

    def save(name: str, tensors: Tensors, metadata: dict[str, str] | None = None) -> None:
        path = folder / name.replace(" ", "_").replace(":", "") / "pytorch_lora_weights.safetensors"
        path.parent.mkdir(parents=True)
        save_file({key: tensor.contiguous() for key, tensor in tensors.items()}, path, metadata)
        written[name] = path

    kohya("kohya: r = 4, α = 8", lambda at: 4, lambda at: 8)
    kohya("kohya: no α", lambda at: 4, lambda at: None)
    kohya("kohya: no α, unequal ranks", ranks_of, lambda at: None)
    kohya("kohya: one α, unequal ranks", ranks_of, lambda at: 4)
    kohya("kohya: unequal α and ranks", ranks_of, lambda at: 2 + at % 2)
    kohya("kohya: α in some modules", lambda at: 4, lambda at: 8 if at % 2 else None)
    kohya("kohya: convolutions", lambda at: 4, lambda at: 2, [*linear, *convolutions])
    kohya("kohya: DoRA", lambda at: 4, lambda at: 4, dora=True)
    diffusers("diffusers: r = 4", lambda at: 4)
    diffusers("diffusers: unequal ranks", ranks_of)
    names = [key.removesuffix(".weight") for key in linear]
    settings = {
        "r": 4,
        "lora_alpha": 6,
        "target_modules": names,
        "rank_pattern": {},
        "alpha_pattern": {names[0]: 12},
    }
    metadata = {f"unet.{key}": value for key, value in settings.items()}
    diffusers("diffusers: metadata", lambda at: 4, metadata)
    hadamard: Tensors = {}
    for key in linear:
        module = f"lora_unet_{key.removesuffix('.weight').replace('.', '_')}"
        for part in ("w1", "w2"):
            b, a = random_pair(weights[key], 4, seeded)
            hadamard |= {f"{module}.hada_{part}_a": b, f"{module}.hada_{part}_b": a}
        hadamard[f"{module}.alpha"] = torch.tensor(4.0)
    save("LyCORIS: LoHa", hadamard)

    title, short = (
        "kohya, text encoder",
        [key for key in text if ".q_proj" in key or ".k_proj" in key],
    )
    kohya(f"{title}: r = 4, α = 8", lambda at: 4, lambda at: 8, text)
    kohya(f"{title}: lora_te1, no α, unequal ranks", ranks_of, lambda at: None, text, encoder="te1")
    kohya(f"{title}: unequal α and ranks", ranks_of, lambda at: 2 + at % 2, text)
    kohya(f"{title}: α in some modules", lambda at: 4, lambda at: 8 if at % 2 else None, text)
    kohya(f"{title}: q and k only", lambda at: 4, lambda at: 8, short)
    kohya(
        f"{title} and U-Net",
        lambda at: 4,
        lambda at: 8 if at < len(text) else 2,
        [*text, *linear],
        encoder="te1",
    )
    title, own = "diffusers, text encoder", ("lora_linear_layer.up", "lora_linear_layer.down")
    diffusers(f"{title}: lora_A", lambda at: 4, keys=text)
    diffusers(
        f"{title}: lora_A, MLP only", lambda at: 4, keys=[key for key in text if ".mlp." in key]
    )
    diffusers(f"{title}: lora_A, α", lambda at: 4, keys=text, alpha=8.0)
    diffusers(f"{title}: unequal ranks", ranks_of, keys=text, parts=own)
    names = sorted({key.split(".")[-2] for key in text})
    metadata = {
        "text_encoder.r": 4,
        "text_encoder.lora_alpha": 6,
        "text_encoder.target_modules": names,
    }
    diffusers(f"{title}: metadata", lambda at: 4, metadata, text, own)
    diffusers(f"{title} and U-Net", lambda at: 4, keys=[*text, *linear], parts=own)
    kohya(
        "kohya, text encoder 2: unequal α and ranks",
        ranks_of,
        lambda at: 2 + at % 2,
        text,
        encoder="te2",
    )
    return written
