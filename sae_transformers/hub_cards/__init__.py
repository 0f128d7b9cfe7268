"""What is published for people: model and dataset cards from measured values, feature dashboards, and the push."""
