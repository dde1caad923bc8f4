"""Tests that need a GPU; each skips with the reason where there is none."""
