"""Complete classifiers."""
