"""What each feature of an SAE writes, and where it is active."""
