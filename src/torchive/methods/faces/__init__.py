"""Faces: detection, recognition, shape."""
