"""Runs notebooks and studies, tracks them, and judges their results."""
