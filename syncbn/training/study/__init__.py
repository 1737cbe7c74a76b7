"""Training with the global batch fixed while the batch per process varies: what synchronization buys."""
