# %% [markdown]
# # Which rank?
#
# Three answers, each with more evidence than the one before: the energy that a budget keeps, the loss of truncated
# updates, and the loss of trained adapters. The last two need the extra `train`
# ([installation](../get-started/installation.md)).

# %%
import lora_diag

BASE, TUNED = "sample_checkpoints/base", "sample_checkpoints/full_ft"
EVAL = "sample_checkpoints/eval/in_domain.txt"
plan = lora_diag.plan(BASE, ranks=[4, 8, 16, 64])
for cost in plan.ranks:
    print(f"r={cost.rank:<3} {cost.params:>9,} parameters, {cost.of_model:.1%} of the model")

# %% [markdown]
# ## Energy under a budget
#
# No allocation of 80,000 parameters within the caps keeps more of the update's energy than this one:

# %%
spectrum = lora_diag.spectrum(BASE, TUNED)
lora_diag.allocate(spectrum, params="80k")

# %% [markdown]
# ## Loss of the truncated update
#
# W + ΔW_r, measured on held-out text. The errors are paired: both models see the same sequences.

# %%
truncation = lora_diag.probe_truncation(
    BASE, TUNED, eval=[EVAL], ranks=[4, 16, 64], max_sequences=40
)
truncation

# %%
truncation.plot(width="column")

# %% [markdown]
# ## Loss of trained adapters
#
# The held-out loss decides. Rank 16 cannot be told apart from the full fine-tune on these sequences; rank 4 is worse.

# %%
adapters = ["sample_checkpoints/lora_r4", "sample_checkpoints/lora_r16"]
lora_diag.probe_outputs(BASE, TUNED, adapters, eval=[EVAL], max_sequences=40)
