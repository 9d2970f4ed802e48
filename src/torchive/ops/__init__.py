"""Pure functions: boxes, masks, sampling grids, assignment."""
