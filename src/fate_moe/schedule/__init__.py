"""Requests for text, and who is served when. No HTTP here: ``serve`` translates."""
