"""Other people's programs and files: one module each."""
