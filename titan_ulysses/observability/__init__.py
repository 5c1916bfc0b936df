"""Metrics, Weights & Biases, profiles and pictures."""
