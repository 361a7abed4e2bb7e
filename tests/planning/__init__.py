"""Tests of tasks/planning."""
