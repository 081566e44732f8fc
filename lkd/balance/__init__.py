"""What sets weights in a loss: one file or few a paper."""
