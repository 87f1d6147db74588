"""Training: one loop for every estimator, resumable to the same weights."""
