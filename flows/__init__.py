"""Composition only: which stage runs, where its work lies, and who is told."""
