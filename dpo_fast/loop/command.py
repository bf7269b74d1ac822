"""The commands of the loop share this: an error that a user can mend ends as one line on stderr and exit status 2."""

import sys
from collections.abc import Callable

# Packages that the extra [loop] brings.
_EXTRA = ("fastapi", "uvicorn", "crowdkit", "matplotlib", "transformers", "peft", "jinja2", "pandas", "scipy")


def run_command(run: Callable[[list[str]], None], argv: list[str] | None) -> int:
    """Call `run(argv)` and return the exit status: 0, 2 after an error, which is printed, or 130 after Ctrl-C."""
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
    except KeyboardInterrupt:
        print("dpo_fast: interrupted; the same command goes on where it was", file=sys.stderr)
        return 130
    else:
        return 0
    print(f"dpo_fast: error: {' '.join(text.split())}", file=sys.stderr)
    return 2
