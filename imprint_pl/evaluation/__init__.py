"""The results of a validation or test: predictions, figures of each class, pictures and a page."""
