"""Compile the CPU kernels while the package is built, where there is a compiler; all else stands in pyproject.toml."""

import importlib.util
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext

FOLDER = Path(__file__).parent / "triton_kernels" / "cpu"


class BuildKernels(build_ext):
    """Compiles them as the package itself would on first use; a failure leaves that to it."""

    def run(self) -> None:
        """Compile, unless setuptools itself, which has no part in it, stumbles over $CC or $CXX."""
        try:
            super().run()
        except ValueError as error:
            self._say(error)

    def get_ext_filename(self, fullname: str) -> str:
        """The library belongs to no version of Python."""
        return f"{Path(*fullname.split('.'))}.so"

    def build_extension(self, ext: Extension) -> None:
        """Compile, or say why not."""
        spec = importlib.util.spec_from_file_location("compiler", FOLDER / "compiler.py")
        compiler = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(compiler)
        try:
            compiler.compile_library(compiler.find_compiler(), Path(self.get_ext_fullpath(ext.name)))
        except (compiler.CompilerError, OSError) as error:
            self._say(error)

    def _say(self, error: Exception) -> None:
        self.warn(f"the CPU kernels are not compiled: {error}; llmprune tries again on first use")


class AnyPython(bdist_wheel):
    """A wheel for this platform and any Python."""

    def get_tag(self) -> tuple[str, str, str]:
        """Neither Python nor torch is linked."""
        return "py3", "none", super().get_tag()[2]


setup(
    ext_modules=[Extension("llmprune.kernels.cpu.kernels", [], optional=True)],
    cmdclass={"build_ext": BuildKernels, "bdist_wheel": AnyPython},
)
