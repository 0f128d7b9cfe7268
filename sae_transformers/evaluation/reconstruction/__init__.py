"""What an SAE keeps of hidden states, and of the model's predictions."""
