"""A user's own code: one file of Python, run where the command line or a recipe names it, and only there."""

import importlib.util
import sys
from pathlib import Path

from lkd.core.errors import UserError, first_line

MODULE = "lkd_plugins"


def import_plugins(plugins: str | None) -> None:
    """Run the file, which registers networks by `lkd.register`; again in every process, with whatever is beside it."""
    if plugins is None:
        return
    path = Path(plugins).expanduser().resolve()
    specification = importlib.util.spec_from_file_location(MODULE, path)
    if not path.is_file() or specification is None or specification.loader is None:
        raise UserError(f"plugins: {plugins} is not a file of Python (.py); give one that calls lkd.register")
    module = importlib.util.module_from_spec(specification)
    sys.modules[MODULE] = module  # classes in it can then be copied and pickled
    if str(path.parent) not in sys.path:
        sys.path.append(str(path.parent))
    try:
        specification.loader.exec_module(module)
    except UserError:
        raise
    except Exception as error:
        raise UserError(f"plugins: {plugins} fails: {type(error).__name__}: {first_line(error)}") from error
