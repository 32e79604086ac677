"""The tokens that the leading directions of ΔW write and read, through the model's own unembedding
and embedding.

A left singular vector u of a matrix that writes to the residual stream adds W_U·u to the logits; a
right one, v, of a matrix that reads from it responds to token t by E_t·v. Tokens are ranked by
cosine after the mean over the vocabulary is subtracted, so that what all tokens share does not
count: the softmax ignores it in logits. Norms between the layer and the vocabulary are left out.

For a direction that is uniform on the sphere of dimension d, the square of its cosine with any
fixed vector has the distribution Beta(1/2, (d − 1)/2), so that a token's p-value is exact. It is
multiplied by the number of tokens and of directions looked at (Bonferroni 1936), which holds
however similar tokens are.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from statistics import median

import torch
from torch import Tensor

from lora_diag.deltas import Side, has_tied_head, is_head, is_table, row_blocks
from lora_diag.diagnostics.geometry.record import TokenDirection
from lora_diag.errors import InputError
from lora_diag.linalg.devices import move
from lora_diag.storage import Checkpoint
from lora_diag.storage.documents import MAX_INDEX_BYTES, read_object

# Directions of an update that are looked at, and tokens of each that a record holds.
DIRECTIONS, TOKENS = 4, 8

# Names of matrices that write to the residual stream, and that read from it.
WRITES = re.compile(
    r"(^|[._])(o_proj|wo|out_proj|attn_output|down_proj|w2|fc2|ffn_down|dense_4h_to_h)$"
)
READS = re.compile(
    r"(^|[._])(q_proj|k_proj|v_proj|qkv_proj|wq|wk|wv|gate_proj|up_proj|gate_up_proj|w1|w3|fc1|attn_[qkv]|ffn_gate|ffn_up"
    r"|query_key_value|dense_h_to_4h)$"
)


def find_tables(base: Checkpoint) -> tuple[Side, Side]:
    """Return the embedding ``(V, d)`` and the unembedding of a model; both the same if they are
    tied.

    Raises:
        InputError: The checkpoint has none, or several that may be it.
    """
    tables = [name for name in base if is_table(name) and len(base[name].shape) == 2]
    tokens = [
        name
        for name in tables
        if re.search(r"(embed_tokens|wte|tok_embeddings|word_embeddings|embed_in)", name)
    ]
    heads = [name for name in base if is_head(name) and len(base[name].shape) == 2]
    embedding = tokens if len(tokens) == 1 else tables
    if len(embedding) != 1 or not (heads or has_tied_head(base)):
        problem = (
            f"has {len(embedding)} token embeddings and {len(heads)} heads over the vocabulary"
        )
        raise InputError(
            base.path, problem, "$lens needs one of each: give the whole model, or leave out $lens"
        )
    return Side(base, embedding[0]), Side(base, (heads or embedding)[0])


def look_through(
    layer: str, vectors: tuple[Tensor, Tensor], base: Checkpoint, random: torch.Generator
) -> list[TokenDirection]:
    """Return the tokens of the leading directions of ΔW that a layer writes or reads; empty for
    neither.

    Args:
        layer: The weight's name.
        vectors: U ``(m, K)`` and V ``(n, K)`` of the K leading directions, float64.
        base: BASE, with the tables of ``find_tables``.
        random: Source of random directions.
    """
    name = re.sub(r"(\.weight)?(\[\d+\])?$", "", layer)
    reads, writes = find_tables(base)
    sides = [("writes", vectors[0], writes)] if WRITES.search(name) else []
    sides += [("reads", vectors[1], reads)] if READS.search(name) else []
    found = []
    for side, directions, table in sides:
        shape = table.info.shape[0], table.info.shape[1]
        if len(directions) == shape[1]:
            blocks = [move(block, directions.device).float() for block in row_blocks(table, shape)]
            words = read_words(Path(base.file_of(table.name)).parent / "tokenizer.json")
            found += rank_tokens(side, torch.cat(blocks), directions, words, random)
    return found


def rank_tokens(
    side: str, table: Tensor, directions: Tensor, words: Sequence[str], random: torch.Generator
) -> list[TokenDirection]:
    """Return for each direction the tokens with the largest cosines, with a corrected p-value.

    Args:
        side: ``writes`` or ``reads``.
        table: Embeddings of the tokens, ``(V, d)`` float32.
        directions: ``(d, n)``, unit columns.
        words: Tokens as text, by number; may have fewer than V.
        random: Source of as many random directions.
    """
    from scipy.special import betainc  # 0.1 s

    centered = table - table.mean(0)
    centered /= torch.linalg.vector_norm(centered, dim=1, keepdim=True).clamp(
        min=torch.finfo(table.dtype).tiny
    )
    noise = torch.randn(directions.shape, generator=random).to(table)
    by_chance = (centered @ (noise / noise.norm(dim=0))).abs().amax(0).tolist()
    cosines = centered @ directions.to(table)
    found, looked_at = [], cosines.numel()
    for number, column in enumerate(cosines.T, 1):
        best = column.abs().topk(min(TOKENS, len(column))).indices.tolist()
        signed = [max(-1.0, min(1.0, float(column[token]))) for token in best]
        p = float(betainc((len(directions) - 1) / 2, 0.5, 1 - signed[0] ** 2))
        found.append(
            TokenDirection(
                side=side,
                number=number,
                tokens=tuple(best),
                words=tuple(words[token] if token < len(words) else f"#{token}" for token in best),
                cosines=tuple(signed),
                cosine_random=min(1.0, median(by_chance)),
                p=min(1.0, looked_at * p),
            )
        )
    return found


@lru_cache(maxsize=2)
def read_words(path: Path) -> tuple[str, ...]:
    """Return the vocabulary of a ``tokenizer.json`` as text, by number, without added tokens; empty
    without the file.

    Raises:
        InputError: The file cannot be read, or has no vocabulary.
    """
    if not path.is_file():
        return ()
    content = read_object(path, "tokenizer", MAX_INDEX_BYTES)
    model = content.get("model")
    vocabulary = model.get("vocab") if isinstance(model, dict) else None
    if isinstance(vocabulary, list):  # Unigram: pairs of piece and score
        vocabulary = {
            str(pair[0]): number
            for number, pair in enumerate(vocabulary)
            if isinstance(pair, list) and pair
        }
    if not isinstance(vocabulary, dict) or not all(
        isinstance(number, int) for number in vocabulary.values()
    ):
        raise InputError(
            f"{path}: has no vocabulary; write it again with the tokenizers library, or move it "
            "away"
        )
    words = [
        f"#{number}"
        for number in range(min(len(vocabulary), max(vocabulary.values(), default=-1) + 1))
    ]
    for piece, number in vocabulary.items():
        if 0 <= number < len(words):
            words[number] = decode_piece(piece)
    return tuple(words)


def decode_piece(piece: str) -> str:
    """Return a piece of a byte-level or SentencePiece vocabulary as text; a part of a character as
    it is.

    >>> decode_piece("Ġhello"), decode_piece("▁hello"), decode_piece("Ã©t"), decode_piece("Ã")
    (' hello', ' hello', 'ét', 'Ã')
    """
    shown = [*range(33, 127), *range(161, 173), *range(174, 256)]
    hidden = [byte for byte in range(256) if byte not in shown]
    byte_of = {chr(byte): byte for byte in shown} | {
        chr(256 + i): byte for i, byte in enumerate(hidden)
    }
    if all(letter in byte_of for letter in piece):
        try:
            return bytes(byte_of[letter] for letter in piece).decode()
        except UnicodeDecodeError:
            return piece
    return piece.replace("▁", " ")
