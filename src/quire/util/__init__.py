"""Small modules that every layer may use: logging, the version."""
