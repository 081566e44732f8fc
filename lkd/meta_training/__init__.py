"""Learning a distillation loss."""
