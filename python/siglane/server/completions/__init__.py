"""Texts that are continued as they stand."""
