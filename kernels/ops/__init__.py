"""One operation a file: the torch reference, and beside it, with the same signature, its kernel."""
