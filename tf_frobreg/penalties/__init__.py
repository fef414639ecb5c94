"""Penalties on one kernel and their gradients: R_α, and the penalties of other methods."""
