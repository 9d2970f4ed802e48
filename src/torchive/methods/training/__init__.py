"""Procedures around a model."""
