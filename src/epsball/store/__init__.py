"""Runs on disk. Knows bytes and dictionaries, no models."""
