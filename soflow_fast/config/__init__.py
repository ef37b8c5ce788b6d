"""The configuration of a run: fields, presets, and the checks of their meaning."""
