"""Direct Preference Optimization: log-probs, losses, reference."""
