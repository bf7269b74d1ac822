"""The loop around training: candidates, the pairs that people and judges prefer, what is exported, and rounds of it all."""
