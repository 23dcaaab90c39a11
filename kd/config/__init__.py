"""Schema of recipes and datasets, its YAML reader, and its JSON schema for editors."""
