"""What a loss does, found out without a training."""
