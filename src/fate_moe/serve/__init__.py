"""The HTTP server: routes translate the APIs that clients speak, a scheduler does the work. Needs the extra ``serve``."""
