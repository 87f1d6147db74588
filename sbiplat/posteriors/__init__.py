"""Posteriors: what answers sample and log_prob in the user's own parameter space."""
