"""Checks of the Kubernetes manifests that need no cluster; `tools/validate_manifests.py` runs them all."""
