"""Small, runnable examples; run them from a clone of the repository."""
