"""Measurements of the data path, as ratios to a floor measured in the same run."""
