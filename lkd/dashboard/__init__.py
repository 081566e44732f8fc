"""Weights & Biases as code: a workspace for every project, a report of a comparison."""
