"""What a run is: configuration, presets, and what they must mean."""
