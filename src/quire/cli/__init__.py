"""The `quire` command. Each subcommand is a file; nothing heavy is imported before one is chosen."""
