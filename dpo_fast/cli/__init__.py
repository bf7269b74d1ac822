"""The options of `python -m dpo_fast.train`, and the way from flags and a YAML file to them."""
