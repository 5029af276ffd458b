"""Attention of a step's rows over a paged cache and over each other."""
