"""A training's state as raw bytes and a schema, whole or in shares, and back."""
