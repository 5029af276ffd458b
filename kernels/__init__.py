"""Device operations of the TiDAR step: one folder per operation, a plain-torch reference beside each kernel.

Nothing heavy is imported here on purpose: Transformers probes for a package named ``kernels`` when it is imported.
"""
