"""Serves a classifier over HTTP: predictions, a page, and changes of the classes while it runs."""
