"""Samples, folders, checks and synthetic data."""
