"""Data: order, seeding, loaders and collators."""
