"""Breaks a running cluster on purpose, under load, and proves from the record that nobody noticed."""
