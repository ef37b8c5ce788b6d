"""Checks that a way computes the right thing, which come before its timing."""
