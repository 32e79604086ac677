"""``residual``: what an adapter missed of a full fine-tune."""
