"""Computes what a layout of attention groups and expert hosts would do; pure: no torch, no network, no clock."""
