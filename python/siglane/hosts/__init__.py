"""Engines of others that run siglane's vision: one folder for each, and here what they share."""
