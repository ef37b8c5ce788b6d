"""The way of samples from a data set to the device of a step."""
