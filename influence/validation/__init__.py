"""Ground truth and rivals: exact Gauss-Newton, PBRF, LiSSA, ASTRA, retraining."""
