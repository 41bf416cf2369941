"""Small things every layer may use: logging, the version."""
