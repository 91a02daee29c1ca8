"""What is computed, in its plainest form; a faster path beside it has to equal it."""
