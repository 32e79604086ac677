# %% [markdown]
# # Is my fine-tune low-rank?
#
# This notebook measures the update ΔW = W_tuned − W_base of a fine-tune, layer by layer. It needs loradiag
# ([installation](../get-started/installation.md)) and the two checkpoints. The samples are those of the repository;
# replace the paths by your own, or by an adapter alone.

# %%
import lora_diag

BASE, TUNED = "sample_checkpoints/base", "sample_checkpoints/full_ft"
results = lora_diag.spectrum(BASE, TUNED)
results

# %% [markdown]
# Read three things:
#
# - **Resolution**: whether the files can show the update at all. If it is not `yes`, do not read ranks.
# - **C(16)** is the fraction of the update's energy Σσ² that the best adapter of rank 16 keeps.
# - **r@90%** is the smallest rank that keeps 90%.
#
# The same as a figure, one line per layer:

# %%
results.plot("energy", width="column")

# %% [markdown]
# ## Layers that need most
#
# Records are plain data. `energy_error` bounds the error of every energy fraction.

# %%
for record in sorted(results, key=lambda record: record.energy["16"])[:5]:
    print(
        f"{record.layer:<40} C(16) = {record.energy['16']:.3f} ± {record.energy_error:.0e}   {record.resolution.verdict}"
    )

# %% [markdown]
# ## By module type, as columns
#
# `results.columns()` feeds any library of data frames; `to_pandas()`, `to_polars()` and `to_arrow()` need theirs.

# %%
table = results.columns()
attention = [
    rank
    for rank, kind in zip(table["rank_at.0.9"], table["module_type"], strict=True)
    if "attn" in kind
]
mlp = [
    rank
    for rank, kind in zip(table["rank_at.0.9"], table["module_type"], strict=True)
    if "mlp" in kind
]
print(
    "rank at 90%: attention",
    min(attention),
    "to",
    max(attention),
    "- MLP",
    min(mlp),
    "to",
    max(mlp),
)

# %% [markdown]
# Low-rank in weight space is not the same as easy to learn with LoRA: C(r) describes compressing *this* update. Whether
# an adapter of that rank trains as well is a question for the held-out loss: *Which rank?*
