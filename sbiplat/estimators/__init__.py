"""Estimators: base and registry, one file an estimator."""
