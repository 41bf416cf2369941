"""The version, alone, so that the lowest layers and the build can read it without importing more."""

VERSION = "0.1.0.dev0"
