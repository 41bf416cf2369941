"""The version, in a file of its own, so that the lowest layers and the build can read it without imports."""

VERSION = "0.1.0.dev0"
