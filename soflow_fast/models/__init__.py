"""The networks, and their forwards: plain, fused, paired."""
