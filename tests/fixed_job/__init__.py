"""A fixed job over the embedded models, and the records that it must always give."""
