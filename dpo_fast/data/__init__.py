"""The way from files to token ids: sources, layouts, tokenisation, and a report of what the trainer will see."""
