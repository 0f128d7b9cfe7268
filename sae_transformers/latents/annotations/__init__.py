"""What is known of features in words: descriptions, who gave them, numbers beside them, and searching them."""
