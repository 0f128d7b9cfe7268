"""What SpARE is compared with: a file for each kind of method, a line for each in the registry."""
