"""Large model support and activation policies for any torch module: `lms` moves saved tensors to host memory under a limit, `narrowing`
keeps them in bf16, `keeping` says what a recomputed layer keeps. Nothing here knows the rest of the package.
"""
