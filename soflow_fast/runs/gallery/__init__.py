"""The page that shows runs: `soflow_fast.gallery`."""
