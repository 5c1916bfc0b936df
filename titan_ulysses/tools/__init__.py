"""What users do with data, runs and models beside training: a module for each subcommand."""
