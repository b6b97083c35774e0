"""Other libraries: one thin module each, imported when a model of that library appears."""
