"""What steering changes in text, and what it costs."""
