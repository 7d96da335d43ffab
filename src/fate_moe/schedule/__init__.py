"""Requests for text, and the order in which they run. No HTTP: ``serve`` translates."""
