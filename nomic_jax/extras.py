"""Packages that only some tasks need: setup.py lists them as extras."""

import contextlib
from collections.abc import Iterator


class MissingPackage(ModuleNotFoundError):
    """A package of an extra is not installed; the message has the command that installs it."""


@contextlib.contextmanager
def needs(purpose: str, requirement: str) -> Iterator[None]:
    """Surrounds the imports of optional packages.

    Args:
      purpose: what needs the packages, such as "reading parquet files"; the message begins with it.
      requirement: what pip installs, such as "nomic_jax[train]" or "wandb".

    Raises:
      MissingPackage: instead of the ModuleNotFoundError of an import; says what to install.
    """
    try:
        yield
    except MissingPackage:
        raise
    except ModuleNotFoundError as error:
        package = (error.name or "a package").partition(".")[0]
        install = requirement if requirement.isidentifier() else f'"{requirement}"'
        raise MissingPackage(
            f"{purpose} needs {package}, which is not installed: pip install {install}", name=error.name
        ) from error
