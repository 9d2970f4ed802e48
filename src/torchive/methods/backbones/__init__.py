"""Images or clips to feature levels."""
