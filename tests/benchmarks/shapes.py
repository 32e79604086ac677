"""Shapes of the models that are measured on."""

from collections.abc import Iterator


def llama_layer(hidden: int, inner: int, kv: int) -> Iterator[tuple[str, int, int]]:
    """Yield name, out, in of the matrices of one block."""
    for name, out, width in (("q", hidden, hidden), ("k", kv, hidden), ("v", kv, hidden), ("o", hidden, hidden)):
        yield f"self_attn.{name}_proj.weight", out, width
    for name, out, width in (("gate", inner, hidden), ("up", inner, hidden), ("down", hidden, inner)):
        yield f"mlp.{name}_proj.weight", out, width
