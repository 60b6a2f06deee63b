"""What checks, measures and shows the library; no model runs through it."""
