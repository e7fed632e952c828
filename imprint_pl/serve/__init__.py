"""A classifier behind HTTP: predictions, a page, and classes that come and go while it runs."""
