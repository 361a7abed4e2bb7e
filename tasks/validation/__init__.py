"""Benchmarks: models small enough for the ground truth, and estimators held against it."""
