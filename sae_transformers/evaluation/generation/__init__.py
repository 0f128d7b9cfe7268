"""Text under steering: made, continued, and how likely it is."""
