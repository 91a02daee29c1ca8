"""Evaluation of finished runs: held-out pairs, probes and their figures."""
