"""The singular values of M: all of them, or the largest and the smallest."""
