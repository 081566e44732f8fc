"""Questions about losses and runs."""
