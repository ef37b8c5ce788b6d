"""Records of measurements, and the pages that are made of them: `python -m benchmarks.report`."""
