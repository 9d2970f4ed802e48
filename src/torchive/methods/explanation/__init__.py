"""Model and input to maps."""
