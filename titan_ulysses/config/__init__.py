"""Settings of a run: the schema, TOML files, the command line, and checks that need nothing
else.
"""
