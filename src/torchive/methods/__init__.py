"""The archive: one module, or one small folder, per published method."""
