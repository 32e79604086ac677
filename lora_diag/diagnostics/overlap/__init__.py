"""``overlap``: whether gradients stay in the subspaces of an update."""
