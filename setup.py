"""The two optional C extensions; everything else stands in setup.cfg. Without a compiler the package installs and runs in Python."""

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.errors import CompileError


class BuildWithOpenMPIfPossible(build_ext):
    """Compile with OpenMP where the compiler has it, else without."""

    def build_extension(self, ext: Extension) -> None:
        """Build one extension. Raises CompileError, which an optional extension turns into a warning."""
        if "-fopenmp" not in ext.extra_compile_args:
            return super().build_extension(ext)
        try:
            super().build_extension(ext)
        except CompileError:
            ext.extra_compile_args.remove("-fopenmp")
            ext.extra_link_args.remove("-fopenmp")
            super().build_extension(ext)


setup(
    cmdclass={"build_ext": BuildWithOpenMPIfPossible},
    ext_modules=[
        Extension("prottrans_hpc.corpus._kernel", ["prottrans_hpc/corpus/_kernel.c"], optional=True, extra_compile_args=["-O3"]),
        Extension(
            "prottrans_hpc.train._lamb", ["prottrans_hpc/train/_lamb.c"], optional=True, extra_compile_args=["-O3", "-fopenmp"], extra_link_args=["-fopenmp"]
        ),
    ],
)
