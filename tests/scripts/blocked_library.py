"""Importing this makes the library impossible to import, as on a machine where it is not installed."""

import sys
from importlib.abc import MetaPathFinder


class _Refusal(MetaPathFinder):
    def find_spec(self, fullname, path=None, target=None):
        if fullname.partition(".")[0] == "sae_transformers":
            raise ModuleNotFoundError(f"No module named {fullname!r}: it is blocked", name=fullname)
        return


sys.meta_path.insert(0, _Refusal())
