"""Stand-ins for what takes seconds and gigabytes to start: torchrun, the ranks, and the facts of a model."""
