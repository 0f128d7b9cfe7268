"""What is known of features in the layouts of other tools."""
