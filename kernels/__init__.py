"""Pure tensor functions: no modules, no configs, no files.

Each function states its shapes, its error and its source. Nothing is imported here, so that
`import kernels` costs nothing; import the module you need.
"""
