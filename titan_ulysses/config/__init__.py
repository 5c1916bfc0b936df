"""Settings of a run: their schema, TOML files, the command line, and checks of the settings."""
