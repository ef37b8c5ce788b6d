"""Tests of the operations on pairs: value and increment. A package, because its files bear the names of their twins."""
