"""Influence of training examples, and losses weighted by it (KD-AIF, arXiv 2501.02705)."""
