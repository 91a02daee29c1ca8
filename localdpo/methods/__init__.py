"""The ways to teach, one module each: the rows that one reads, its loss and its metrics."""
