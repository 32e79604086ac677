"""``verify-merge``: whether a merged checkpoint holds what the adapter says."""
