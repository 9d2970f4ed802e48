"""Complete detectors."""
