"""What a run comes to, as one page that needs nothing else: figures, curves, answers, and what they mean."""
