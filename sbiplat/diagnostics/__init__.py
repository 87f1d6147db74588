"""Coverage, information and other figures of a posterior on held-out pairs: they measure, the gate decides."""
