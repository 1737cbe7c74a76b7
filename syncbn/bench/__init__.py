"""Measuring the layer, against others, in one run."""
