"""dpo_fast inside the trainers that people already have: one import or one call per trainer, docs/drop-in.md lists them.

Each module needs its peer installed and nothing else of this folder. What patches a peer returns a function that undoes it,
refuses versions it was not tested with, and leaves nothing half patched.
"""
