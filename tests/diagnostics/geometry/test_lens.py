"""Tokens of directions: planted ones are found, random ones are not, and bad inputs are named."""

import json

import numpy as np
import pytest
import torch

import lora_diag
from lora_diag.diagnostics.geometry.lens import TOKENS, rank_tokens, read_words
from lora_diag.diagnostics.geometry.show import LEVEL
from lora_diag.errors import InputError
from tests.conftest import save_model
from tests.messages import assert_names

WORDS, WIDTH = 300, 48
DOWN, UP = (f"model.layers.0.mlp.{name}_proj.weight" for name in ("down", "up"))


def make(folder, seed=0, planted=0.0, head=True, config=None):
    """Save a model and an update of it; the down projection writes token 17, the up projection
    reads token 5.
    """
    rng = np.random.default_rng(seed)
    tables = {"model.embed_tokens.weight": rng.standard_normal((WORDS, WIDTH)) + 3}
    if head:
        tables["lm_head.weight"] = rng.standard_normal((WORDS, WIDTH))
    base = {DOWN: rng.standard_normal((WIDTH, 80)), UP: rng.standard_normal((80, WIDTH))}
    tuned = {name: w + 0.01 * rng.standard_normal(w.shape) for name, w in base.items()}
    if planted:
        last, first = tables[next(reversed(tables))], tables[next(iter(tables))]
        written, read = last - last.mean(0), first - first.mean(0)
        tuned[DOWN] += planted * np.outer(written[17], rng.standard_normal(80))
        tuned[UP] += planted * np.outer(rng.standard_normal(80), read[5])
    for name, weights in (("base", base), ("tuned", tuned)):
        tensors = {key: torch.tensor(value).float() for key, value in {**tables, **weights}.items()}
        save_model(folder / name, tensors, config or {"tie_word_embeddings": not head})
    return folder / "base", folder / "tuned"


def write_tokenizer(folder, vocabulary):
    (folder / "tokenizer.json").write_text(
        json.dumps({"model": {"type": "BPE", "vocab": vocabulary}})
    )


@pytest.mark.parametrize("head", [True, False], ids=["head", "tied"])
def test_planted_token_is_found(tmp_path, head, loradiag):
    sides = make(tmp_path, planted=0.05, head=head)
    write_tokenizer(sides[0], {f"Ġw{n}": n for n in range(WORDS)})
    found = {
        r.layer: r.lens for r in lora_diag.geometry(*sides, layers="mlp", top=4, draws=1, lens=True)
    }
    for layer, side, token in ((DOWN, "writes", 17), (UP, "reads", 5)):
        first, *others = found[layer]
        assert (first.side, first.number, first.tokens[0], first.words[0]) == (
            side,
            1,
            token,
            f" w{token}",
        )
        assert first.p < 1e-9
        assert abs(first.cosines[0]) > 0.9 > 0.7 > first.cosine_random
        assert min(other.p for other in others) > 1e-3
    shown = loradiag(
        "geometry", *sides, "--layers", "mlp", "--lens", "--draws", 1, env={"COLUMNS": "200"}
    )
    assert_names(shown.out, "1 of model.layers.0.mlp.down_proj writes ' w17'")


def test_random_updates_rarely_have_tokens_beyond_chance():
    """Bonferroni over tokens and directions, for tokens that are far from independent of each
    other.
    """
    source = torch.Generator().manual_seed(2)
    table = torch.randn(WORDS, 8, generator=source) @ torch.randn(8, WIDTH, generator=source) + 1
    table += 0.3 * torch.randn(WORDS, WIDTH, generator=source)
    false = 0
    for _ in range(200):
        u = torch.linalg.svd(torch.randn(WIDTH, 12, generator=source, dtype=torch.float64))[0][
            :, :4
        ]
        false += min(each.p for each in rank_tokens("writes", table, u, (), source)) <= LEVEL
    assert false <= 0.05 * 200


def test_p_value_is_that_of_a_random_direction():
    """The fraction of random directions with a larger cosine to one token, times the tokens looked
    at.
    """
    rng = np.random.default_rng(3)
    table = torch.tensor(rng.standard_normal((3, 6))).float()
    u = torch.tensor(np.linalg.qr(rng.standard_normal((6, 1)))[0])
    (found,) = rank_tokens("reads", table, u, ("a",), torch.Generator())
    centered = (table - table.mean(0)).double().numpy()
    cosines = (centered @ u.numpy())[:, 0] / np.linalg.norm(centered, axis=1)
    order = np.argsort(-np.abs(cosines))
    assert found.tokens == tuple(order)
    assert found.cosines == pytest.approx(cosines[order], abs=1e-6)
    assert found.words == tuple("a" if token == 0 else f"#{token}" for token in order)
    drawn = rng.standard_normal((200_000, 6))
    larger = np.abs(drawn[:, 0]) / np.linalg.norm(drawn, axis=1) >= np.abs(cosines).max()
    assert found.p == pytest.approx(min(1, 3 * larger.mean()), abs=0.02)
    assert len(found.tokens) <= TOKENS


def test_missing_table_is_named(tmp_path, loradiag):
    sides = [save_model(tmp_path / name, {UP: torch.randn(8, 6)}) for name in ("base", "tuned")]
    done = loradiag("geometry", *sides, "--lens")
    assert done.code == 3
    assert_names(done.err, f"{sides[0]}", "0 token embeddings", "--lens")


@pytest.mark.parametrize("content", ["[]", "{", '{"model": {"vocab": {"a": "b"}}}', '{"model": 3}'])
def test_damaged_tokenizer_is_named(tmp_path, content):
    (tmp_path / "tokenizer.json").write_text(content)
    with pytest.raises(InputError) as caught:
        read_words(tmp_path / "tokenizer.json")
    assert_names(str(caught.value), f"{tmp_path / 'tokenizer.json'}")


def test_unigram_vocabulary_and_numbers_out_of_range(tmp_path):
    (tmp_path / "a.json").write_text(json.dumps({"model": {"vocab": [["▁x", -1.0], ["y", -2.0]]}}))
    assert read_words(tmp_path / "a.json") == (" x", "y")
    (tmp_path / "b.json").write_text(
        json.dumps({"model": {"vocab": {"a": 0, "b": 10**12, "c": -4}}})
    )
    assert read_words(tmp_path / "b.json") == ("a", "#1", "#2")
    assert read_words(tmp_path / "none.json") == ()
