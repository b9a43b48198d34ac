"""The two optional C extensions; everything else stands in setup.cfg. Without a compiler the package installs and runs in Python."""

from setuptools import Extension, setup

# Results do not depend on the instruction set when no product is contracted with a sum; sqrtf is vectorised only without errno.
ARITHMETIC = ["-ffp-contract=off", "-fno-math-errno", "-fno-trapping-math"]

setup(
    ext_modules=[
        Extension(
            "prottrans_hpc.corpus._kernel",
            ["prottrans_hpc/corpus/_kernel.c"],
            depends=["prottrans_hpc/corpus/_blake2b.h"],
            optional=True,
            extra_compile_args=["-O3"],
        ),
        Extension(
            "prottrans_hpc.train._lamb",
            ["prottrans_hpc/train/_lamb.c"],
            optional=True,
            extra_compile_args=["-O3", "-pthread", *ARITHMETIC],
            extra_link_args=["-pthread"],
        ),
    ],
)
