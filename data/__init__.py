"""Images in, finished batches out: sources, order, augmentation, loading, mixing. Knows nothing of models."""
