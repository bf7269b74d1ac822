"""dpo_fast inside the trainers that people already have, by one import or one call per trainer (docs/drop-in.md).

Each module needs only its own peer installed. A function that patches a peer returns another that undoes the patch; it
refuses versions that were not tested and leaves nothing half patched.
"""
