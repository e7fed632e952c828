"""What a validation or test leaves behind: predictions, figures of each class, pictures, a page."""
