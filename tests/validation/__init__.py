"""Tests of tasks/validation."""
