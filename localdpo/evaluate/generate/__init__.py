"""Pairs out of a model's own answers: sampling them, scoring them, and rounds of that with training between."""
