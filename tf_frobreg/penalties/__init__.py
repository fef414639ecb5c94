"""The penalties on one kernel, with their gradients: R_α, and those of other methods."""
