"""What a run will cost, before it runs: sized, reckoned and timed; and what it took, afterwards."""
