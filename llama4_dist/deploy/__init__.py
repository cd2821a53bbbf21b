"""Turns a plan into what a deployment runs: settings and patches of Kubernetes objects. Knows no Ray and no torch."""
