"""Banks: the format, one atomic segment, the farm that fills them, and the order in which training reads them."""
