"""Command lines: parsing, exit codes, reports."""
