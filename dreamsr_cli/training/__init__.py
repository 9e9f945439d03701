"""Training of bundles: data, stages, checkpoints."""
