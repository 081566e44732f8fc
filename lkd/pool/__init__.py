"""Students at many ages, from which rollouts start."""
