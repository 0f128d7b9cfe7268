"""What features a text has, what a feature stands for, and pages of both."""
