"""Register with transformers once it is imported, without importing it, so that `import llmprune` stays fast."""

import sys
from collections.abc import Sequence
from importlib import import_module
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from importlib.util import find_spec
from types import ModuleType

# What every `from_pretrained` imports before it looks for a quantizer.
_AWAITED = "transformers.modeling_utils"


def register_with_transformers() -> None:
    """Make packed checkpoints loadable: now if transformers is already imported, otherwise as soon as it is."""
    if _AWAITED in sys.modules:
        _register()
    elif not any(isinstance(finder, _Watcher) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Watcher())


def _register() -> None:
    # This module registers at its end. If it is itself importing transformers, it is half imported and will get there.
    import_module("llmprune.serving.quantizer")


class _Watcher(MetaPathFinder):
    """Finds no modules itself; registers after the import of one module."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname != _AWAITED:
            return None
        sys.meta_path.remove(self)
        spec = find_spec(fullname)
        if spec is not None and spec.loader is not None:
            spec.loader = _FollowedLoader(spec.loader)
        return spec


class _FollowedLoader(Loader):
    def __init__(self, loader: Loader) -> None:
        self._loader = loader

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self._loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        self._loader.exec_module(module)
        _register()

    def __getattr__(self, name: str) -> object:
        # Tracebacks and debuggers ask the loader for the source.
        return getattr(self._loader, name)
