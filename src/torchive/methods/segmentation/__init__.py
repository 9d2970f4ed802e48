"""Complete segmenters."""
