"""Learned losses on the Hugging Face Hub and in Weights & Biases."""
