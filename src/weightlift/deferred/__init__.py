"""What is wanted: a module built by its own constructor, with nothing allocated and nothing initialised."""
