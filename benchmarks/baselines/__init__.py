"""Methods that the engine is measured against: our own code, on our network and data; and other people's norms."""
