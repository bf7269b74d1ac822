"""What the commands of the loop have in common: what a user can mend ends as one line on stderr and exit status 2."""

import sys
from collections.abc import Callable

# What the extra [loop] brings.
_EXTRA = ("fastapi", "uvicorn", "crowdkit", "matplotlib", "transformers", "peft", "jinja2", "pandas", "scipy")


def run_command(run: Callable[[list[str]], None], argv: list[str] | None) -> int:
    """The exit status of `run(argv)`: 0, or 2 after an error that it names."""
    try:
        run(sys.argv[1:] if argv is None else argv)
    except ModuleNotFoundError as error:
        package = (error.name or "").split(".")[0]
        if package not in _EXTRA:
            raise
        text = f"{package} is not installed: pip install 'dpo_fast[loop]'"
    except OSError as error:
        text = f"{error.strerror}: {error.filename}" if error.strerror and error.filename else str(error)
    except (ValueError, ImportError) as error:
        text = str(error)
    else:
        return 0
    print(f"dpo_fast: error: {' '.join(text.split())}", file=sys.stderr)
    return 2
