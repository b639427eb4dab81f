"""Adapters between LMDeploy's internals and this package; with ``hook``, the only importers of LMDeploy."""
