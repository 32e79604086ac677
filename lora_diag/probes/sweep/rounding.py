"""Rounding of frozen weights to the values of a quantized base, in ordinary modules.

Values equal those of bitsandbytes (0.50.2 on a CPU: NF4 bit for bit, int8 up to one rounding of float32). Memory is not
reduced, products are in the model's own dtype, and activations, which LLM.int8() also rounds, are not rounded.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

# Quantiles of N(0, 1) with an exact zero: Dettmers et al. 2023, QLoRA, appendix E.
NF4 = (
    -1.0,
    -0.6961928009986877,
    -0.5250730514526367,
    -0.39491748809814453,
    -0.28444138169288635,
    -0.18477343022823334,
    -0.09105003625154495,
    0.0,
    0.07958029955625534,
    0.16093020141124725,
    0.24611230194568634,
    0.33791524171829224,
    0.44070982933044434,
    0.5626170039176941,
    0.7229568362236023,
    1.0,
)
BLOCK = 64
GRIDS = ("nf4", "int8")


def to_nf4(weight: Tensor) -> Tensor:
    """Return the nearest NF4 values: 16 levels times the largest magnitude of each 64 consecutive entries.

    Args:
        weight: ``(out, in)``; blocks are in row-major order and may span rows.

    Example:
        >>> to_nf4(torch.tensor([[0.5, 0.1, -1.0, 0.0]])).tolist()[0][1:]
        [0.07958029955625534, -1.0, 0.0]
    """
    flat = weight.reshape(-1).float()
    blocks = nn.functional.pad(flat, (0, -len(flat) % BLOCK)).view(-1, BLOCK)
    largest = blocks.abs().amax(1, keepdim=True)
    table = torch.tensor(NF4, device=weight.device)
    places = torch.bucketize(blocks / largest.clamp(min=torch.finfo(torch.float32).tiny), (table[1:] + table[:-1]) / 2)
    return (table[places] * largest).view(-1)[: len(flat)].view_as(weight).to(weight.dtype)


def to_int8(weight: Tensor) -> Tensor:
    """Return the nearest of 255 evenly spaced values per row: round(127·w/a)·a/127.

    Args:
        weight: ``(out, in)``; a is the largest magnitude of a row.

    Example:
        >>> to_int8(torch.tensor([[1.27, 0.004, 0.006]])).mul(100).round().tolist()
        [[127.0, 0.0, 1.0]]
    """
    largest = weight.float().abs().amax(1, keepdim=True)
    codes = (
        weight.float() * (127 / largest.clamp(min=1e-30))
    ).round()  # 127 divided by the smallest float32 would be infinite
    return (codes * largest / 127).to(weight.dtype)


@contextmanager
def round_weights(layers: Iterable[nn.Module], grid: str | None) -> Iterator[None]:
    """Round the weights of linear layers within the block, then restore them.

    Args:
        layers: Linear layers, or transformers' Conv1D, whose weights are stored ``(in, out)``.
        grid: ``nf4`` or ``int8``; None to round nothing.

    Reference: Dettmers et al. 2023, QLoRA, equation 4; Dettmers et al. 2022, LLM.int8(), section 3.1.
    """
    weights = [(layer.weight, isinstance(layer, nn.Linear)) for layer in layers] if grid else []
    kept = [weight.detach().to("cpu", copy=True) for weight, _ in weights if isinstance(weight, Tensor)]
    to_grid = to_nf4 if grid == "nf4" else to_int8
    try:
        with torch.no_grad():
            for weight, is_out_in in weights:
                assert isinstance(weight, Tensor)
                weight.copy_(to_grid(weight) if is_out_in else to_grid(weight.T.contiguous()).T)
        yield
    finally:
        with torch.no_grad():
            for (weight, _), original in zip(weights, kept, strict=True):
                assert isinstance(weight, Tensor)
                weight.copy_(original)
