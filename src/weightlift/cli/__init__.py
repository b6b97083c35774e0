"""The command ``weightlift``. Every command is a file; see `weightlift.cli.main`."""
