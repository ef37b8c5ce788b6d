"""A run of several ranks: how they end together, stop together, and who of them speaks."""
