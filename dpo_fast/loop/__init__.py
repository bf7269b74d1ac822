"""The loop around training: candidates, labels of people and judges, export to pairs, and rounds of all of it."""
