"""What dies, on every backend, and what the launcher must make of it."""
