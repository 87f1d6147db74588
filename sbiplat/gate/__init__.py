"""The gate: criteria over diagnostics, and the certificate that binds the verdict to weights and bank."""
