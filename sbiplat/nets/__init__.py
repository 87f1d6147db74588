"""Nets: conditional densities, embeddings, standardisation."""
