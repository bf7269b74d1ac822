"""What the integrations share: the check of a peer's version, and patches that are undone together."""

import importlib.metadata
from collections.abc import Callable
from typing import Any

from packaging.specifiers import SpecifierSet
from packaging.version import Version


def check_version(package: str, *tested: str, any_version: bool = False) -> Version:
    """The installed version of `package`, which must lie in one of `tested`, such as "==1.9.*", ">=1.16,<1.17".

    Raises ImportError where it is not installed or, unless `any_version`, was not tested.
    """
    try:
        found = Version(importlib.metadata.version(package))
    except importlib.metadata.PackageNotFoundError:
        raise ImportError(f"{package} is not installed: pip install '{package}{tested[-1]}'") from None
    if not any_version and not any(SpecifierSet(one).contains(found, prereleases=True) for one in tested):
        raise ImportError(
            f"{package} {found} is installed and dpo_fast was tested with {package}{' or '.join(tested)}: "
            f"pip install '{package}{tested[-1]}', or pass any_version=True to try"
        )
    return found


class Patches:
    """Attributes that were replaced, and their old values, which `undo` puts back.

    with Patches() as patches:           # an error inside undoes what was replaced before it
        patches.replace(module, "name", value)
    undo = patches.undo
    """

    def __init__(self):
        self._replaced: list[tuple[Any, str, Any, Any]] = []

    def replace(self, owner: Any, name: str, value: Any) -> Any:
        """Set `owner.name` to `value` and return its old value. Raises ImportError where the peer has no such name."""
        if not hasattr(owner, name):
            raise ImportError(f"{getattr(owner, '__name__', owner)} has no {name}: this version was not tested")
        old = getattr(owner, name)
        self._replaced.append((owner, name, old, value))
        setattr(owner, name, value)
        return old

    def undo(self) -> None:
        """Put everything back, the last replaced first. A second call changes nothing.

        Raises RuntimeError, and changes nothing, where somebody replaced the same name later: theirs may call ours.
        """
        for owner, name, _, value in self._replaced:
            if getattr(owner, name) is not value:
                where = f"{getattr(owner, '__name__', owner)}.{name}"
                raise RuntimeError(f"{where} was replaced again after this patch: undo that first, then this")
        while self._replaced:
            owner, name, old, _ = self._replaced.pop()
            setattr(owner, name, old)

    def __enter__(self) -> "Patches":
        return self

    def __exit__(self, kind, error, trace) -> None:
        if kind is not None:
            self.undo()


def once(
    active: dict[str, Callable[[], None]], key: str, patch: Callable[[], Callable[[], None]]
) -> Callable[[], None]:
    """Run `patch()` unless `key` is already patched; returns its undo either way, so that a second patch changes nothing."""
    if key not in active:
        undo = patch()

        def undo_once() -> None:
            if key in active:
                undo()
                del active[key]

        active[key] = undo_once
    return active[key]
