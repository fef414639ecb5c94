"""Algorithm 3.1: the descent on R_α of one kernel."""
