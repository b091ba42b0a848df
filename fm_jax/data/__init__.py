"""From documents to batches: the token store, windows, mixtures, the order."""
