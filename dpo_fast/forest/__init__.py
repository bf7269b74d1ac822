"""The prefix forest, which holds every distinct token of a batch once, and a model's trunk over it."""
