"""Simulators shipped with sbiplat: one file a scientific problem, each the example to copy."""
