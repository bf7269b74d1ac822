"""The options of `python -m dpo_fast.train`, and how flags and a YAML file become them."""
