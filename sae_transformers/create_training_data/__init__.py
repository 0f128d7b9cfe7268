"""From text to what training reads: base models, labelled text, hidden states."""
