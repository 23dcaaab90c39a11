"""Recipes and datasets as YAML: the schema, its reader, and the JSON schema for editors."""
