"""The prefix forest: every distinct token of a batch once, and a model's trunk over it."""
