"""`python -m dpo_fast.demo`."""

from .stages import main

raise SystemExit(main())
