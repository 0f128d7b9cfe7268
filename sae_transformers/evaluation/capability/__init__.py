"""What the model still knows."""
