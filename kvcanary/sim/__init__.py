"""A small real engine: a paged transformer, continuous batching and prefix sharing, on NumPy alone."""
